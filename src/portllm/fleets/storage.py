"""Files of a fleet, on this machine or behind a URL that fsspec knows: found, identified, fetched, published.

What is uploaded never looks whole before it is: a record that vouches for the rest goes up last, after the sizes of
the rest were compared; what was there is taken away record first.
"""

import contextlib
import errno
import glob
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
from blake3 import blake3
from fsspec import AbstractFileSystem

from portllm.errors import MissingExtraError, PortLLMError, StorageError
from portllm.files import own_files
from portllm.files.seal import digest_file
from portllm.installed import how_to_get
from portllm.patch.adapter_folder import CARD_FILE, CONFIG_FILE, RECORD_FILE, TENSOR_FILE
from portllm.patch.side_files import SIDE_FILES

PATCH_FILES = (CONFIG_FILE, TENSOR_FILE, RECORD_FILE, *SIDE_FILES)

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""By which extra a protocol is had; of others, fsspec says which package they need."""

_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_NETWORK = {"HTTPClientError", "ConnectionError", "ClientConnectionError"}
"""Errors of botocore and aiohttp, by name, so that neither is needed here; the others' are OSError."""


def is_url(place: str) -> bool:
    """Whether a place is reached through fsspec.

    Example:
        >>> is_url("s3://bucket/patches"), is_url("patches/a")
        (True, False)
    """
    return "://" in place


def resolve(place: str, folder: Path) -> str:
    """A place as it is opened: a URL as it is, a path relative to a folder.

    Example:
        >>> resolve("s3://bucket/patches/", Path("/data")), resolve("patches", Path("/data"))
        ('s3://bucket/patches', '/data/patches')
    """
    return place.rstrip("/") if is_url(place) else os.path.normpath(folder / place)


def join(place: str, name: str) -> str:
    """A name below a place."""
    return f"{place}/{name}"


def find_patches(pattern: str) -> dict[str, str]:
    """The patches that a folder, a folder of folders, or a glob stands for: places by name.

    A name is the path below the part of the pattern that has no wildcard, `/` written as `--`.

    Raises:
        StorageError: The place cannot be listed.
    """
    if not glob.has_magic(pattern):
        places = _with_config(pattern) or _with_config(join(pattern, "*"))
        return {place.rpartition("/")[2]: place for place in places}
    fixed = pattern[: next(i for i, letter in enumerate(pattern) if letter in "*?[")].rpartition("/")[0]
    return {_below(place, fixed): place for place in _with_config(pattern)}


def _below(place: str, fixed: str) -> str:
    return place.removeprefix(fixed).strip("/").replace("/", "--")


def _with_config(pattern: str) -> list[str]:
    with _reached(pattern) as (system, path):
        found = sorted(str(file) for file in system.glob(join(path, CONFIG_FILE)))
        files = [str(system.unstrip_protocol(file)) if is_url(pattern) else file for file in found]
    return [file.removesuffix(f"/{CONFIG_FILE}") for file in files]


def identify_patch(place: str) -> tuple[str, int]:
    """What tells a patch from a changed one, and the bytes of its files.

    On this machine it is a digest of all bytes; elsewhere, of what the storage says that changes with them (an ETag).
    """
    with _reached(place) as (system, path):
        files = {name: join(path, name) for name in PATCH_FILES if system.exists(join(path, name))}
        marks = {name: str(system.checksum(file)) if is_url(place) else digest_file(Path(file))
                 for name, file in files.items()}  # fmt: skip
        size = sum(int(system.size(file)) for file in files.values())
    return "blake3:" + blake3(repr(sorted(marks.items())).encode()).hexdigest(), size


def fetch_patch(place: str, folder: Path) -> Path:
    """Bring a patch to a folder of this machine; one that is here already stays where it is."""
    if not is_url(place):
        return Path(place)
    folder.mkdir()
    with _reached(place) as (system, path):
        for name in (*PATCH_FILES, CARD_FILE):
            if system.exists(join(path, name)):
                system.get_file(join(path, name), str(folder / name))
    return folder


def publish(folder: Path, place: str, *, records: Sequence[str]) -> None:
    """Upload a folder in place of what is there, `records` last.

    Raises:
        StorageError: It could not be uploaded whole; then no record is there.
    """
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    remove(place, records=records)
    for names in ([name for name in files if name not in records], [name for name in files if name in records]):
        with _reached(place) as (system, path):
            for name in names:
                system.put_file(str(files[name]), join(path, name))
        found = sizes(place)
        for name in names:
            expected = files[name].stat().st_size
            if found.get(name) != expected:
                there = f"{expected} bytes were sent, but {found.get(name, 0)} arrived"
                raise StorageError(f"'{join(place, name)}': {there}.", can_pass=True)


def remove(place: str, *, records: Sequence[str] = ()) -> None:
    """Delete what is at a place, `records` first, so that what is left of it vouches for nothing."""
    with _reached(place) as (system, path):
        for name in records:
            if system.exists(join(path, name)):
                system.rm_file(join(path, name))
        if system.exists(path):
            system.rm(path, recursive=True)


def sizes(place: str) -> dict[str, int]:
    """Every file below a place with its bytes; empty where there is nothing."""
    with _reached(place) as (system, path):
        system.invalidate_cache()
        found: dict[str, Any] = system.find(path, detail=True)
        return {name.removeprefix(path).lstrip("/"): int(facts["size"]) for name, facts in found.items()}


def digests(place: str, names: Sequence[str]) -> dict[str, str]:
    """The digest of small files below a place, by name; those that are not there are left out."""
    with _reached(place) as (system, path):
        found = system.cat([join(path, name) for name in names], on_error="omit") if names else {}
        return {file.removeprefix(path).lstrip("/"): blake3(data).hexdigest() for file, data in found.items()}


def read_text(place: str) -> str | None:
    """A small file, or None where there is none."""
    with _reached(place) as (system, path):
        return str(system.cat_file(path).decode("utf-8", "replace")) if system.exists(path) else None


def write_text(place: str, text: str) -> None:
    """Write a small file, whole or not at all."""
    with _reached(place) as (system, path):
        if is_url(place):
            system.pipe_file(path, text.encode())
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        own_files.write_text(Path(path), text)


@contextlib.contextmanager
def _reached(place: str) -> Iterator[tuple[AbstractFileSystem, str]]:
    """The file system of a place and the path in it; whatever it raises becomes an error of ours."""
    try:
        system, path = _system(place.partition("://")[0] if is_url(place) else "file"), place
        yield system, str(system._strip_protocol(path)).rstrip("/")
    except PortLLMError:
        raise
    except ImportError as error:
        raise MissingExtraError(f"'{place}': {error}. {_hint(place)}".rstrip()) from error
    except Exception as error:  # each of fsspec's file systems has errors of its own
        raise StorageError(f"'{place}': {_first_line(error)}.", can_pass=_can_pass(error)) from error


def _hint(place: str) -> str:
    extra = _EXTRAS.get(place.partition("://")[0])
    return how_to_get(extra) if extra else ""


def _can_pass(error: Exception) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, _FINAL) and error.errno not in _FULL
    return any(kind.__name__ in _NETWORK for kind in type(error).__mro__)


@cache
def _system(protocol: str) -> AbstractFileSystem:
    return fsspec.filesystem(protocol, use_listings_cache=False)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__
