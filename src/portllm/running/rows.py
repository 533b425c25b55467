"""Rows of a data file, whatever it is written as: JSONL, one JSON array, CSV or Parquet. Nothing here needs torch.

A row is a mapping of fields. Every row that does not fit is gathered and told of at once; a file of another kind is
named for what it is, with the command that converts it.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import TypeVar

from portllm.errors import DataError
from portllm.files.input_file import local_file, open_input, read_input, require_unchanged
from portllm.files.json_text import parse_json
from portllm.files.near_names import did_you_mean
from portllm.files.seal import digest_file
from portllm.running.other_kinds import BYTE_ORDER_MARK, filled, head_of, why_other_kind

SHOWN_PROBLEMS = 10
MAX_LINE_BYTES = 16_000_000
"""A row is a text that a model reads, of a million tokens at most."""

MAX_ARRAY_BYTES = 64_000_000
"""A JSON array is read whole."""

SEPARATORS = {".csv": (",", ";", "\t"), ".tsv": ("\t",)}
"""What may stand between columns, by a file's suffix; a semicolon is what spreadsheets write in some languages."""

SUFFIXES = (".jsonl", ".json", ".parquet", *SEPARATORS)

MOST_FILES = 10_000
"""Files of a folder that are looked at, to name some that can be read."""

ADDRESS = re.compile(r"(https?|s3|gs):")

PARQUET = b"PAR1"

NOT_UTF8 = (
    "Text must be UTF-8. If this is Latin-1, as older Excel writes it: iconv -f ISO-8859-1 -t UTF-8 {old} > {new}"
)
NOT_JSON = (
    (rb"^\s*\{'", "These are Python's dicts, not JSON: write each row with json.dumps."),
    (rb"\}\s*,\s*$", "Rows are followed by commas: remove these, or put all rows between [ and ]."),
    (rb"^[^{\[]*,", "If this is CSV, give it the suffix .csv."),
    (rb"^[^{\[]*\t", "If this is TSV, give it the suffix .tsv."),
)
"""What may help where no row is JSON, by what the first looks like."""

ONE_OBJECT = (
    "is one JSON object over several lines; expected one row per line, or one array. "
    "Run: jq -c {query} {old} > rows.jsonl"
)

Made = TypeVar("Made")
Row = Mapping[str, object]


class RowError(Exception):
    """Why one row does not fit; gathered by `read_rows`."""


class _NotUtf8Error(RowError):
    def __init__(self, error: UnicodeDecodeError) -> None:
        super().__init__(f"byte {error.start + 1} is not UTF-8")


class _NotJsonError(RowError):
    """The line is no JSON; perhaps the file is of another kind."""


def read_rows(path: str | Path, make: Callable[[Row], Made], *, what: str) -> list[Made]:
    """What is made of the rows of a file, in order; blank lines are skipped.

    Args:
        path: The file.
        make: What to make of a row; raises RowError where it does not fit.
        what: What rows are read for, in words.

    Raises:
        DataError: The file cannot be read, has no rows, or some rows do not fit; all of them are counted, the first
            ten shown with their places.
    """
    made: list[Made] = []
    problems: dict[str, RowError] = {}
    for place, row in _rows(path):
        try:
            made.append(make(row()))
        except RowError as error:
            problems[place] = error
    if problems:
        raise DataError(_render_problems(path, problems, n_rows=len(made) + len(problems), what=what))
    if not made:
        raise DataError(f"'{path}': has no rows; expected {what}, one row per line.")
    return made


def first_row(path: str | Path) -> Row | None:
    """The first row of a file; None where it has none that can be read, which `read_rows` tells of.

    Raises:
        DataError: The file cannot be read.
    """
    for _, row in _rows(path):
        try:
            return row()
        except RowError:
            return None
    return None


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank, as they are but for what ends them; UTF-8.

    Args:
        path: The file.

    Raises:
        DataError: The file cannot be read, has no such lines, or some are not UTF-8 or hold a zero byte.
    """
    lines: list[str] = []
    problems: dict[str, RowError] = {}
    try:
        said = why_other_kind(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if said:
        raise DataError(f"'{path}': {said}")
    for number, line in _numbered_lines(path):
        try:
            lines.append(_decoded(line).rstrip("\r"))
        except RowError as error:
            problems[f"line {number}"] = error
    if problems:
        raise DataError(_render_problems(path, problems, n_rows=len(lines) + len(problems), what="plain text"))
    if not lines:
        raise DataError(f"'{path}': is empty; expected one prompt per line.")
    return lines


def read_with_digest(path: str | Path, read: Callable[[], Made]) -> tuple[Made, str]:
    """The rows of a data file and its digest, both of the same bytes.

    The digest comes last, so that a file with no rows that fit is refused before all of it is read.

    Args:
        path: The file.
        read: Reads its rows.

    Raises:
        DataError: It cannot be read, or `read` refuses a row.
        InputChangedError: It changed meanwhile.
    """
    try:
        file = local_file(Path(path))
        rows = read()
        digest = f"blake3:{digest_file(Path(path))}"
    except OSError as error:
        raise _unreadable(path, error) from error
    require_unchanged([file])
    return rows, digest


def row_texts(row: Row, fields: Sequence[str]) -> dict[str, str]:
    """Fields of a row as text; numbers and booleans become the JSON text that stands in the file.

    Raises:
        RowError: A field is missing or is none of these.
    """
    texts: dict[str, str] = {}
    problems: list[str] = []
    for field in dict.fromkeys(fields):
        value = row.get(field)
        if field not in row:
            problems.append(f"no field '{field}'")
        elif isinstance(value, bool):
            texts[field] = json.dumps(value)
        elif isinstance(value, str):
            texts[field] = value
        else:
            problems.append(f"field '{field}' is {kind_of(value)}; expected text, a number or a boolean")
    if problems:
        there = ", ".join(f"'{name}'" for name in row) or "no fields"
        missing = [field for field in fields if field not in row]
        small = {name.lower(): name for name in row}
        near = [found[0] for field in missing if (found := get_close_matches(field.lower(), small, n=1))]
        meant = f"; did you mean {', '.join(repr(small[name]) for name in dict.fromkeys(near))}?" if near else ""
        raise RowError(f"{'; '.join(problems)} (the row has {there}{meant})")
    return texts


def kind_of(value: object) -> str:
    """What a value is, in words."""
    match value:
        case None:
            return "null"
        case list():
            return "a list"
        case dict():
            return "an object"
        case bool():
            return "a boolean"
        case bytes():
            return "binary data"
        case _:
            return "a text or a number"


def _rows(path: str | Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The place of each row, and what reads it."""
    try:
        head = head_of(path)
        if said := why_other_kind(path):
            raise DataError(f"'{path}': {said}")
        if head.startswith(PARQUET):
            from portllm.running.parquet import parquet_rows  # pyarrow is a library of its own

            values: Iterator[object] = parquet_rows(Path(path))
        elif Path(path).suffix.lower() in SEPARATORS:
            values = _separated(path)
        elif head.lstrip().startswith(b"["):
            values = iter(_array(path))
        elif head.startswith(b"{") and head[1:].split(b"\n")[0].strip() == b"":
            raise DataError(f"'{path}': {_one_object(path)}")
        else:
            for number, line in _numbered_lines(path):
                yield f"line {number}", lambda line=line: _parse_row(line)  # type: ignore[misc]
            return
        for number, value in enumerate(values, start=1):
            yield f"row {number}", lambda value=value: _object(value)  # type: ignore[misc]
    except OSError as error:
        raise _unreadable(path, error) from error


def _array(path: str | Path) -> list[object]:
    text = read_input(path, most=MAX_ARRAY_BYTES).removeprefix(BYTE_ORDER_MARK)
    try:
        values = parse_json(text, numbers_as_text=True)
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}': byte {error.start + 1} is not UTF-8. {filled(NOT_UTF8, path)}") from error
    except ValueError as error:
        raise DataError(
            f"'{path}': begins as a JSON array, but is none: {error}. Correct it, or put each row on a line of its own."
        ) from error
    return values if isinstance(values, list) else [values]


def _one_object(path: str | Path) -> str:
    """What is to be done with a file that holds one object, whose first line is its bracket."""
    try:
        value = parse_json(read_input(path, most=MAX_ARRAY_BYTES), numbers_as_text=True)
    except ValueError as error:
        return f"is neither rows of JSON nor one JSON object: {error}. Put each row on a line of its own."
    lists = [name for name, inner in value.items() if isinstance(inner, list)] if isinstance(value, dict) else []
    return ONE_OBJECT.format(query=f"'.{lists[0]}[]'" if lists else ".", old=path)


def _separated(path: str | Path) -> Iterator[Row]:
    """The rows of a CSV file by the names in its first line; every value is text."""
    with open_input(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        try:
            header = text.readline()
            usual, *others = SEPARATORS[Path(path).suffix.lower()]
            separator = next((other for other in others if other in header and usual not in header), usual)
            text.seek(0)
            table = csv.reader(text, delimiter=separator, strict=True)
            names = next(table, [])
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(f"'{path}': column '{twice[0]}' stands twice in its first line. Rename one.")
            for cells in table:
                if len(cells) not in (0, len(names)):
                    raise DataError(
                        f"'{path}', line {table.line_num}: has {len(cells)} columns, the first line names "
                        f"{len(names)}. Put quotation marks around values that contain '{separator}'."
                    )
                if cells:
                    yield dict(zip(names, cells, strict=True))
        except UnicodeDecodeError as error:
            raise DataError(f"'{path}': is not UTF-8. {filled(NOT_UTF8, path)}") from error
        except csv.Error as error:
            raise DataError(f"'{path}': is not valid CSV: {error}. Correct it, or write the rows as JSONL.") from error


def _numbered_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers, without a byte order mark."""
    try:
        with open_input(path) as stream:
            for number in count(1):
                line = stream.readline(MAX_LINE_BYTES + 1)
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"'{path}', line {number}: has more than {MAX_LINE_BYTES} bytes, which no row of text has."
                    )
                if not line:
                    return
                line = line.removeprefix(BYTE_ORDER_MARK if number == 1 else b"").removesuffix(b"\n")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: OSError) -> DataError:
    remedy = "Pass a data file: JSONL, JSON, CSV or Parquet."
    folder = Path(path)
    near = did_you_mean(path) if isinstance(error, FileNotFoundError) else ""
    if isinstance(error, FileNotFoundError) and (address := ADDRESS.match(str(path))):
        remedy = f"{address[0]}... is an address: download what is there, and pass the file."
    elif near:
        remedy += near
    elif isinstance(error, FileNotFoundError) and _names_hub(path):
        remedy += f" A dataset of the Hugging Face Hub has the address hf://datasets/{path}/SPLIT."
    if isinstance(error, IsADirectoryError):
        files = itertools.islice(itertools.chain(folder.glob("*.*"), folder.glob("*/*.*")), MOST_FILES)
        inside = sorted(str(file.relative_to(folder)) for file in files if file.suffix.lower() in SUFFIXES)
        if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            remedy = "It is the folder of a model or an adapter. Pass the file with your rows."
        elif (folder / "dataset_info.json").is_file():
            code = f"import datasets; datasets.load_from_disk({str(path)!r}).to_json('rows.jsonl')"
            remedy = f'It was saved by datasets: python -c "{code}"'
        elif inside:
            remedy = f"Pass a file of it: {', '.join(inside[:SHOWN_PROBLEMS])}."
    return DataError(f"'{path}': cannot be read: {error.strerror}. {remedy}")


def _names_hub(path: str | Path) -> bool:
    """Whether what is not there may be meant as a dataset of the hub.

    Example:
        >>> _names_hub("stanfordnlp/imdb"), _names_hub("train.jsonl"), _names_hub("./data/train")
        (True, False, False)
    """
    parts = str(path).split("/")
    return (
        len(parts) <= 2 and not Path(path).suffix and "." not in parts and not (parts[1:] and Path(parts[0]).exists())
    )


def _decoded(line: bytes) -> str:
    if b"\0" in line:
        raise RowError(f"byte {line.index(0) + 1} is zero, which is not text")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _NotUtf8Error(error) from error


def _render_problems(path: str | Path, problems: Mapping[str, RowError], *, n_rows: int, what: str) -> str:
    lines = [f"'{path}': {len(problems)} of {n_rows} rows do not match {what}. Correct the rows, or the field names."]
    alike: dict[str, list[str]] = {}
    for place, problem in problems.items():
        alike.setdefault(str(problem), []).append(place)
    for why, places in [*alike.items()][:SHOWN_PROBLEMS]:
        others = f" and {len(places) - 1} more" if len(places) > 1 else ""
        lines.append(f"  {places[0]}{others}: {why}")
    if len(alike) > SHOWN_PROBLEMS:
        lines.append(f"  and {sum(map(len, [*alike.values()][SHOWN_PROBLEMS:]))} more.")
    if any(isinstance(problem, _NotUtf8Error) for problem in problems.values()):
        lines.append(filled(NOT_UTF8, path))
    if len(problems) == n_rows and all(isinstance(problem, _NotJsonError) for problem in problems.values()):
        with open_input(path) as stream:
            first = stream.readline(MAX_LINE_BYTES)
        lines += [said for looks, said in NOT_JSON if re.search(looks, first)][:1]
    return "\n".join(lines)


def _parse_row(line: bytes) -> Row:
    try:
        return _object(parse_json(line, numbers_as_text=True))
    except UnicodeDecodeError as error:
        raise _NotUtf8Error(error) from error
    except json.JSONDecodeError as error:
        raise _NotJsonError(f"is not JSON: {error.msg} at character {error.pos + 1}") from error
    except ValueError as error:
        raise RowError(f"is not a valid row: {error}") from error


def _object(value: object) -> Row:
    if not isinstance(value, dict):
        raise RowError(f"is {kind_of(value)}; expected an object")
    return value
