"""Files that hold no rows that are read: what each is, told by how it begins, and what makes a data file of it."""

import zipfile
from pathlib import Path

from portllm.files.input_file import open_input

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

TO_UTF8 = "is UTF-16; expected UTF-8. Run: iconv -f {code} -t UTF-8 {{old}} > {{new}}"
AS_CSV = "Save the sheet as CSV: in Excel, 'Save as', 'CSV UTF-8'; or run: soffice --headless --convert-to csv {old}"

KINDS = (
    (b"\xff\xfe", TO_UTF8.format(code="UTF-16")),
    (b"\xfe\xff", TO_UTF8.format(code="UTF-16")),
    (b"{\0", TO_UTF8.format(code="UTF-16LE")),
    (b"\0{", TO_UTF8.format(code="UTF-16BE")),
    (b"\x1f\x8b", "is compressed with gzip. Run: gunzip -k {old}"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd. Run: zstd -d {old}"),
    (b"BZh", "is compressed with bzip2. Run: bunzip2 -k {old}"),
    (b"\xfd7zXZ", "is compressed with xz. Run: unxz -k {old}"),
    (b"\xd0\xcf\x11\xe0", f"is an Excel workbook of the old kind. {AS_CSV}"),
    (b"%PDF", "is a PDF. Write its rows as JSONL or CSV."),
    (b"<!DOCTYPE html", "is a web page, as a download without a login gives it. Download the data file itself."),
    (b"<html", "is a web page, as a download without a login gives it. Download the data file itself."),
    (b"<?xml", "is XML. Write its rows as JSONL or CSV."),
    (
        b"ARROW1",
        'is an Arrow file. Run: python -c "import pandas; pandas.read_feather({old!r}).to_parquet({parquet!r})"',
    ),
    (b"SQLite format 3", "is an SQLite database. Run: sqlite3 -csv -header {old} 'select * from TABLE' > rows.csv"),
    (b"version https://git-lfs", "is a Git LFS pointer; the data was not downloaded. Run: git lfs pull"),
    (b"\x80\x04", "is a pickle, which is never read. Save the rows as JSONL."),
    (b"\x93NUMPY", "is an array of NumPy. Write the rows as JSONL."),
    (b"GGUF", "is a model in GGUF, not data. Pass the file with your rows."),
)
"""How files of other kinds begin, what they are, and what makes rows of them."""

ZIP = b"PK\x03\x04"
ZIPPED = (
    ("xl/", ".xlsx", f"is an Excel workbook. {AS_CSV}"),
    ("content.xml", ".ods", f"is a workbook of LibreOffice. {AS_CSV}"),
    ("word/", ".docx", "is a Word document. Write its rows as JSONL or CSV."),
    ("data.pkl", ".pt", "is a file of PyTorch, not data. Pass the file with your rows."),
)
"""What stands in ZIP archives of other kinds, by a part of a name, or the suffix where the archive is damaged."""

HEAD_BYTES = 64


def head_of(path: str | Path) -> bytes:
    """How a file begins, without a byte order mark.

    Raises:
        OSError: It cannot be read.
    """
    with open_input(path) as stream:
        return stream.read(HEAD_BYTES).removeprefix(BYTE_ORDER_MARK)


def why_other_kind(path: str | Path) -> str | None:
    """What a file is that holds no rows that are read, and what to do; None where it may hold some.

    Raises:
        OSError: It cannot be read.
    """
    head = head_of(path)
    said = next((said for start, said in KINDS if head.lower().startswith(start.lower())), None)
    if head.startswith(ZIP):
        said = _zipped(path)
    return None if said is None else filled(said, path)


def filled(text: str, path: str | Path) -> str:
    """A remedy for a file; `new` is a file beside it."""
    old = Path(path)
    new, parquet = old.with_name(f"{old.stem}-utf8{old.suffix}"), old.with_suffix(".parquet")
    return text.format(old=str(old), new=new, parquet=str(parquet))


def _zipped(path: str | Path) -> str:
    names, suffix = [], Path(path).suffix.lower()
    try:
        with open_input(path) as stream, zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError):
        pass  # the suffix says what it was
    for part, usual, said in ZIPPED:
        if any(part in name for name in names) or (not names and suffix == usual):
            return said
    inside = f" It holds {', '.join(names[:3])}{', ...' * (len(names) > 3)}." if names else ""
    return (
        f"is a ZIP archive. Run: unzip {{old}}{'' if not inside else ' -d rows'}, and pass a file of it.{_safe(inside)}"
    )


def _safe(text: str) -> str:
    return "".join(mark if mark.isprintable() else "?" for mark in text).replace("{", "{{").replace("}", "}}")
