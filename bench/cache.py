"""The page cache before a run: a folder's files in it, or out of it."""

import os
from collections.abc import Iterable
from pathlib import Path

READ_BYTES = 1 << 24


def settle() -> None:
    """Have what earlier runs wrote on the disk, so that no later run waits for it."""
    os.sync()


def warm(folders: Iterable[Path]) -> None:
    """Read every file of the folders."""
    for file in _files(folders):
        with open(file, "rb", buffering=0) as stream:
            while stream.read(READ_BYTES):
                pass


def cool(folders: Iterable[Path]) -> None:
    """Drop the files from the page cache with posix_fadvise; the bytes a run then fetches show that they were."""
    for file in _files(folders):
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(folders: Iterable[Path]) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
