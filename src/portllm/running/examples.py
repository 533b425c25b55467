"""Rows of a JSONL file as prompts and completions; nothing here needs torch.

A row is a JSON object. A template with plain `{field}` placeholders makes the prompt of it, one field is the
completion.
Every row that does not fit is gathered and told of at once.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeVar

from portllm.errors import DataError
from portllm.files.input_file import local_file, open_input, require_unchanged
from portllm.files.json_text import parse_json
from portllm.files.seal import digest_file

SHOWN_PROBLEMS = 10
MAX_LINE_BYTES = 16_000_000
"""A row is a text that a model reads, of a million tokens at most."""

_PIECE = re.compile(r"(?P<literal>[^{}]+)|(?P<escape>\{\{|\}\})|\{(?P<field>[^{}]*)\}|(?P<stray>[{}])")
_FIELD = re.compile(r"[^\W\d][\w-]*")

Made = TypeVar("Made")
Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its correct completion.

    Attributes:
        prompt: The text before the completion, as it is; whitespace at its end counts.
        completion: The text to learn or to score, without whitespace around it.
    """

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Template:
    """A text with plain `{field}` placeholders; `{{` and `}}` stand for braces.

    No attributes, indices, conversions or format specifications: a template comes from a command line and its fields
    from a file, and neither should reach into Python objects.

    Args:
        text: The template.

    Raises:
        DataError: A brace has no partner, or what stands between braces is not a field's name.

    Example:
        >>> template = Template("Q: {question} {{sic}}")
        >>> template.fields, template.fill({"question": "why?"})
        (('question',), 'Q: why? {sic}')
    """

    text: str

    def __post_init__(self) -> None:
        if not self.text.isprintable() and any(0xD800 <= ord(sign) <= 0xDFFF for sign in self.text):
            raise DataError(f"template {self.text!r}: is not valid UTF-8. Write it in the encoding of this terminal.")
        for piece in _PIECE.finditer(self.text):
            field = piece["field"]
            if piece["stray"] or (field is not None and not _FIELD.fullmatch(field)):
                raise DataError(
                    f"template '{self.text}': '{piece[0]}' at character {piece.start() + 1} is not a placeholder; "
                    "expected '{field}' with the name of a field. Write '{{' and '}}' for literal braces."
                )

    @property
    def fields(self) -> tuple[str, ...]:
        """The names between braces, each once, in order of appearance."""
        return tuple(dict.fromkeys(piece["field"] for piece in _PIECE.finditer(self.text) if piece["field"]))

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with every placeholder replaced by its value."""
        return "".join(
            piece["literal"] or (piece["escape"] or "")[:1] or values[piece["field"]]
            for piece in _PIECE.finditer(self.text)
        )


@dataclass(frozen=True, slots=True)
class ExampleFormat:
    r"""The template and field that turn a row into an `Example`.

    Args:
        prompt: Template of the prompt, such as `"Question: {question}\nType:"`.
        completion: Name of the field that holds the completion.

    Raises:
        DataError: The template is broken or names no field, or the completion's name stands in it.
    """

    prompt: str
    completion: str

    def __post_init__(self) -> None:
        fields = Template(self.prompt).fields
        if not fields:
            raise DataError(
                f"template '{self.prompt}': names no field, so every prompt would be the same. "
                "Put a field of the rows between braces, such as '{question}'."
            )
        if self.completion in fields:
            raise DataError(
                f"template '{self.prompt}': '{{{self.completion}}}' is the completion; a prompt that contains it "
                "leaves nothing to learn. Remove it from the template, or choose another completion field."
            )


def completion_text(prompt: str, completion: str) -> str:
    """The completion as it follows the prompt: after one space, or directly where the prompt ends in whitespace.

    Example:
        >>> completion_text("Type:", "treatment"), completion_text("Type: ", "treatment")
        (' treatment', 'treatment')
    """
    return completion if not prompt or prompt[-1].isspace() else f" {completion}"


def read_examples(path: str | Path, fmt: ExampleFormat) -> list[Example]:
    """Read the examples in a JSONL file, in order; blank lines are skipped.

    Text is UTF-8, with or without a byte order mark; lines may end in CRLF. Numbers and booleans become the JSON text
    that stands in the file.

    Args:
        path: The file.
        fmt: Prompt template and completion field.

    Raises:
        DataError: The file cannot be read, has no rows, or some rows do not fit; all of them are counted, the first
            ten shown with their line numbers.
    """
    template = Template(fmt.prompt)

    def make(row: Row) -> Example:
        texts = _texts(row, (*template.fields, fmt.completion))
        completion = texts[fmt.completion].strip()
        if not completion:
            raise _RowError(f"field '{fmt.completion}' is empty; expected the completion")
        prompt = template.fill(texts)
        if not prompt.strip():
            raise _RowError("the prompt is blank")
        return Example(prompt=prompt, completion=completion)

    return _read(path, make, what=f"the prompt '{fmt.prompt}' and the completion '{fmt.completion}'")


def read_prompts(path: str | Path, template: str, *, completion: str | None) -> tuple[list[str], list[str] | None]:
    r"""The prompts in a JSONL file, and their completions if the rows have them; otherwise as `read_examples`.

    Args:
        path: The file.
        template: For instance `"Question: {question}\nType:"`.
        completion: Field of the completion, or None: none is looked for.

    Raises:
        DataError: As for `read_examples`; or some rows have a completion and others not.
    """
    if completion is not None:
        ExampleFormat(prompt=template, completion=completion)  # refuses a prompt that shows the answer
    parsed = Template(template)

    def make(row: Row) -> tuple[str, str]:
        asked = completion is not None and row.get(completion) not in (None, "")
        texts = _texts(row, (*parsed.fields, completion) if asked and completion else parsed.fields)
        prompt = parsed.fill(texts)
        if not prompt.strip():
            raise _RowError("the prompt is blank")
        return prompt, texts[completion].strip() if asked and completion else ""

    made = _read(path, make, what=f"the prompt '{template}'")
    n_completed = sum(bool(text) for _, text in made)
    if 0 < n_completed < len(made):
        raise DataError(
            f"'{path}': {n_completed} of {len(made)} rows have a completion in '{completion}', the others do not. "
            "Either all or none must have one."
        )
    return [prompt for prompt, _ in made], [text for _, text in made] if n_completed else None


def read_texts(path: str | Path, template: str) -> list[str]:
    r"""The texts that a template makes of the rows of a JSONL file; as `read_examples`, without a completion.

    Args:
        path: The file.
        template: For instance `"{question}\n{answer}"`.

    Raises:
        DataError: As for `read_examples`.
    """
    parsed = Template(template)

    def make(row: Row) -> str:
        text = parsed.fill(_texts(row, parsed.fields))
        if not text.strip():
            raise _RowError("the text is blank")
        return text

    return _read(path, make, what=f"the text '{template}'")


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank, as they are but for what ends them; UTF-8.

    Args:
        path: The file.

    Raises:
        DataError: The file cannot be read, has no such lines, or some are not UTF-8 or hold a zero byte.
    """
    lines: list[str] = []
    problems: list[str] = []
    for number, line in _numbered_lines(path, what="Pass a text file."):
        try:
            lines.append(_decoded(line).rstrip("\r"))
        except _RowError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise DataError(_render_problems(str(path), problems, n_rows=len(lines) + len(problems), what="plain text"))
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
        raise DataError(f"'{path}': cannot be read: {error.strerror}. Pass a data file.") from error
    require_unchanged([file])
    return rows, digest


class _RowError(Exception):
    """Why one row does not fit; gathered by `_read`."""


def _read(path: str | Path, make: Callable[[Row], Made], *, what: str) -> list[Made]:
    made: list[Made] = []
    problems: list[str] = []
    for number, line in _numbered_lines(path, what="Pass a JSONL file."):
        try:
            made.append(make(_parse_row(line)))
        except _RowError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise DataError(_render_problems(str(path), problems, n_rows=len(made) + len(problems), what=what))
    if not made:
        raise DataError(f"'{path}': has no rows; expected one JSON object per line for {what}.")
    return made


def _numbered_lines(path: str | Path, *, what: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers, without a byte order mark."""
    try:
        with open_input(path) as stream:
            for number in count(1):
                line = stream.readline(MAX_LINE_BYTES + 1)
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"'{path}', line {number}: has more than {MAX_LINE_BYTES} bytes. {what}")
                if not line:
                    return
                line = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").removesuffix(b"\n")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"'{path}': cannot be read: {error.strerror}. {what}") from error


def _decoded(line: bytes) -> str:
    if b"\0" in line:
        raise _RowError(f"byte {line.index(0) + 1} is zero, which is not text")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _RowError(f"byte {error.start + 1} is not UTF-8") from error


def _render_problems(path: str, problems: Sequence[str], *, n_rows: int, what: str) -> str:
    lines = [f"'{path}': {len(problems)} of {n_rows} rows do not match {what}. Correct the rows, or the field names."]
    lines += [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  and {len(problems) - SHOWN_PROBLEMS} more.")
    return "\n".join(lines)


def _parse_row(line: bytes) -> Row:
    try:
        row = parse_json(line, numbers_as_text=True)
    except UnicodeDecodeError as error:
        raise _RowError(f"byte {error.start + 1} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise _RowError(f"is not JSON: {error.msg} at character {error.pos + 1}") from error
    except ValueError as error:
        raise _RowError(f"is not a valid row: {error}") from error
    if not isinstance(row, dict):
        raise _RowError(f"is {_kind(row)}; expected an object")
    return row


def _texts(row: Row, fields: Sequence[str]) -> dict[str, str]:
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
            problems.append(f"field '{field}' is {_kind(value)}; expected text, a number or a boolean")
    if problems:
        there = ", ".join(f"'{name}'" for name in row) or "no fields"
        raise _RowError(f"{'; '.join(problems)} (the row has {there})")
    return texts


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case list():
            return "a list"
        case dict():
            return "an object"
        case bool():
            return "a boolean"
        case _:
            return "a text or a number"
