"""Write a checkpoint: the layout first, from names and shapes alone, then the bytes, one tensor after another.

Nothing appears under its final name before it is whole: files go into a sibling folder that takes the name at the end
(see `portllm.checkpoint.staging`), and that is removed when anything goes wrong.
"""

import contextlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from portllm.checkpoint import page_cache
from portllm.checkpoint.header import DTYPE_BITS, n_bytes_of, render_header
from portllm.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from portllm.checkpoint.source import Source
from portllm.checkpoint.staging import Journal, Place, Staged, begin, remove
from portllm.errors import OutputError, OutputExistsError, Refusal

METADATA = {"format": "pt"}
"""What transformers looks for in a file's header."""

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to write: what the header says of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return n_bytes_of(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write: its name and its tensors, in the order in which their bytes follow."""

    file: str
    entries: tuple[Entry, ...]

    @property
    def header(self) -> bytes:
        """The file's first bytes."""
        return render_header([(entry.name, entry.dtype, entry.shape) for entry in self.entries], METADATA)


def lay_out(entries: Mapping[str, Entry], *, shard_bytes: int = DEFAULT_SHARD_BYTES) -> tuple[Shard, ...]:
    """Which tensor goes into which file, in which order; the same whatever order `entries` comes in.

    Tensors go by name into files of at most `shard_bytes` (a larger tensor has a file of its own); inside a file wide
    dtypes come first, so that every tensor is aligned.

    Example:
        >>> entries = {name: Entry(name, "F32", (4,)) for name in ("b", "a", "c")}
        >>> [(shard.file, [entry.name for entry in shard.entries]) for shard in lay_out(entries, shard_bytes=32)]
        [('model-00001-of-00002.safetensors', ['a', 'b']), ('model-00002-of-00002.safetensors', ['c'])]
    """
    groups: list[list[Entry]] = []
    size = 0
    for name in sorted(entries):
        entry = entries[name]
        if not groups or size + entry.n_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.n_bytes
    if len(groups) <= 1:
        names = [SINGLE_FILE]
    else:
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return tuple(
        Shard(file, tuple(sorted(group, key=lambda entry: (-DTYPE_BITS[entry.dtype], entry.name))))
        for file, group in zip(names, groups or [[]], strict=True)
    )


def render_index(shards: tuple[Shard, ...]) -> str | None:
    """The text of the index file, or None where one file holds all."""
    if len(shards) == 1:
        return None
    entries = [(entry, shard.file) for shard in shards for entry in shard.entries]
    weight_map = {entry.name: file for entry, file in sorted(entries, key=lambda pair: pair[0].name)}
    total = sum(entry.n_bytes for entry, _ in entries)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def write_index(folder: Path, shards: tuple[Shard, ...]) -> None:
    """Write the index file, where there is more than one shard."""
    text = render_index(shards)
    if text is not None:
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")


class ShardWriter:
    """One file being written: its tensors' bytes in the order of the layout, or each tensor's from a thread of its own.

    Args:
        folder: Where.
        shard: What the file is to hold.
        keep_cached: Leave in the kernel's cache what was written.
    """

    def __init__(self, folder: Path, shard: Shard, *, keep_cached: bool = True) -> None:
        header = shard.header
        self._path = folder / shard.file
        self._keep_cached = keep_cached
        self._starts: dict[str, int] = {}
        self._expected = len(header)
        for entry in shard.entries:
            self._starts[entry.name] = self._expected
            self._expected += entry.n_bytes
        self._lock = threading.Lock()
        self._written = 0
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self.append(header)

    def append(self, data: bytes | memoryview) -> None:
        """The next bytes of the file."""
        self._write(data, self._written)

    def write(self, name: str, start: int, data: bytes | memoryview) -> None:
        """Bytes of one tensor from its byte `start` on; threads may write at the same time."""
        self._write(data, self._starts[name] + start)

    def _write(self, data: bytes | memoryview, place: int) -> None:
        view = memoryview(data).cast("B")
        stop = place + len(view)
        while view:
            count = os.pwrite(self._file, view, stop - len(view))
            view = view[count:]
        with self._lock:
            self._written += stop - place
        if stop // page_cache.STEP_BYTES != place // page_cache.STEP_BYTES:
            # The disk begins at once: left alone, the kernel gathers for half a minute and `fsync` waits for it all.
            page_cache.release(self._file, stop - page_cache.STEP_BYTES, page_cache.STEP_BYTES)

    def close(self) -> None:
        """Bring the file to the disk.

        Raises:
            OutputError: It has not the bytes that its header promises.
        """
        try:
            os.fsync(self._file)
            if not self._keep_cached:
                page_cache.release(self._file)
        finally:
            self.abandon()
        if self._written != self._expected:
            raise OutputError(
                f"'{self._path}': {self._written} bytes were written, its header promises {self._expected}."
            )

    def abandon(self) -> None:
        """Let go of a file that will not be finished."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


@contextlib.contextmanager
def staged_folder(final: Path, *, overwrite: bool, wait: bool = False) -> Iterator[Path]:
    """A fresh folder beside `final` that takes its name when the block ends, and vanishes if the block fails.

    What a run that died left there is removed, and what it was about to replace gets its name back.

    Args:
        final: The folder to be.
        overwrite: Replace what is there; it stays whole until the new folder is.
        wait: For another run that writes there, to its end.

    Raises:
        OutputExistsError: `final` exists and `overwrite` is False.
        OutputBusyError: Another run writes there, and `wait` is False.
        OutputError: The parent folder is missing or cannot be written.
    """
    with resumable_folder(final, overwrite=overwrite, plan=None, wait=wait) as staged:
        yield staged.folder


@contextlib.contextmanager
def resumable_folder(final: Path, *, overwrite: bool, plan: str | None, wait: bool = False) -> Iterator[Staged]:
    """As `staged_folder`, but what a run that was interrupted or died has finished stays for the next of the same plan.

    Args:
        final: The folder to be.
        overwrite: Replace what is there; it stays whole until the new folder is.
        plan: Digest of all that the output depends on, or None: nothing is ever kept.
        wait: For another run that writes there, to its end.

    Raises:
        OutputExistsError, OutputBusyError, OutputError: As `staged_folder`.
    """
    check_free(final, overwrite=overwrite)
    place = Place(final if final.name not in ("", "..") else final.resolve())
    with _journal(place, wait=wait) as journal:
        try:
            place.settle(journal.inode)
            check_free(final, overwrite=overwrite)
            staged = begin(place, journal, plan)
        except OSError as error:
            raise OutputError(f"'{final}': cannot write into '{final.parent}': {error.strerror}.") from error
        try:
            yield staged
            check_free(final, overwrite=overwrite)
            place.take()
        except BaseException as error:
            place.settle(journal.inode)
            if not (plan is not None and journal.finished and isinstance(error, KeyboardInterrupt | SystemExit)):
                remove(place.part)
            if isinstance(error, OSError):
                raise OutputError(
                    f"'{final}': could not be written: {error.strerror or error}. Nothing was left there."
                ) from error
            raise


@contextlib.contextmanager
def _journal(place: Place, *, wait: bool) -> Iterator[Journal]:
    """The journal of a place, locked; it is deleted at the end unless it describes a part that stays."""
    try:
        place.final.parent.mkdir(parents=True, exist_ok=True)
        journal = Journal(place.journal, wait=wait)
    except OSError as error:
        raise OutputError(f"'{place.final}': cannot write into '{place.final.parent}': {error.strerror}.") from error
    try:
        yield journal
    finally:
        if not place.part.is_dir():
            journal.remove()
        journal.close()


def check_free(final: Path, *, overwrite: bool) -> None:
    """Raise OutputExistsError if something is at `final` that may not be replaced."""
    if os.path.lexists(final) and not overwrite:
        raise OutputExistsError(
            f"'{final}': is there already. Choose another place, or pass --overwrite to replace it."
        )
    if os.path.lexists(final) and not final.is_dir():
        raise OutputExistsError(f"'{final}': is a file; the output is a folder. Choose another place.")


def check_apart(final: Path, inputs: Iterable[Source]) -> None:
    """Raise OutputError if a file that is read lies in the folder `final`, which `--overwrite` would replace whole.

    The same goes for the siblings that a run writes to before the output takes its name.
    """
    place = Place(final.resolve())
    places = (place.final, place.part, place.old) if place.final.name else (place.final,)
    for file in inputs:
        if not isinstance(file, Path):
            continue
        # A file may be a link out of its folder, as in the cache of the Hugging Face Hub; neither end may be lost.
        ends = (file.parent.resolve() / file.name, file.resolve())
        if any(place in end.parents for end in ends for place in places):
            raise OutputError(f"'{final}': holds '{file}', which is read for the output. Write to another folder.")


class Room:
    """What disks have free, less what is promised to outputs that are yet to be written."""

    def __init__(self) -> None:
        self._promised: Counter[int] = Counter()

    def refusals(self, final: Path, n_bytes: int) -> tuple[Refusal, ...]:
        """Why an output of so many bytes cannot be written: the disk has no room for it.

        What an interrupted run has written already does not count again; what is replaced stays until the end, and
        does.
        """
        parent = _existing_parent(final)
        needed = _missing_bytes(final, n_bytes)
        free = shutil.disk_usage(parent).free - self._promised[parent.stat().st_dev]
        if needed <= free:
            return ()
        found = f"{needed:,} bytes are to be written, '{parent}' has {max(0, free):,} free."
        return (Refusal(str(final), f"{found} Make room, or write to another disk."),)

    def promise(self, final: Path, n_bytes: int) -> None:
        """Set room aside for an output."""
        self._promised[_existing_parent(final).stat().st_dev] += _missing_bytes(final, n_bytes)


def _missing_bytes(final: Path, n_bytes: int) -> int:
    """What is left to write of an output of so many bytes."""
    part = Place(final.resolve()).part
    return n_bytes - sum(file.stat().st_size for file in part.glob("*") if file.is_file())


def _existing_parent(final: Path) -> Path:
    return next(folder for folder in final.absolute().parents if folder.is_dir())
