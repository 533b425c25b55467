"""A page on disk: whole or not at all, and never in the place of something else unless that is meant."""

import os
from pathlib import Path

from portllm.errors import OutputError, OutputExistsError
from portllm.files.own_files import write_text

PAGE_START = b"<!doctype html>"


def check_page_free(file: Path, *, overwrite: bool) -> None:
    """Refuse a place for a page, before the work that fills it.

    Args:
        file: Where it is to be.
        overwrite: Whether a file there may be replaced.

    Raises:
        OutputExistsError: Something is there that may not be replaced.
    """
    if not os.path.lexists(file):
        return
    if file.is_dir():
        raise OutputExistsError(f"'{file}': is a folder; the page is a file. Choose another path.")
    if not overwrite:
        raise OutputExistsError(f"'{file}': already exists. Choose another path, or pass --overwrite to replace it.")
    if not file.is_symlink() and not _is_page(file):
        raise OutputExistsError(
            f"'{file}': is not an HTML page, so it is not replaced. Choose another path, or delete it first."
        )


def _is_page(file: Path) -> bool:
    if not file.is_file():  # a pipe could be waited for forever
        return False
    with open(file, "rb") as stream:
        return stream.read(len(PAGE_START)).lower() in (b"", PAGE_START)


def write_page(file: Path, text: str, *, overwrite: bool) -> None:
    """Write a page; it takes its name when all of it is on the disk.

    Args:
        file: Where; its folder is made where it is missing.
        text: The page.
        overwrite: Replace a file that is there.

    Raises:
        OutputExistsError: As `check_page_free`.
        OutputError: It cannot be written; nothing is left.
    """
    check_page_free(file, overwrite=overwrite)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    except OSError as error:
        raise OutputError(f"'{file}': cannot be written: {error.strerror}. Nothing was left behind.") from error
