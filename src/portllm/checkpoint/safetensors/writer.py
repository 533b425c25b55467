"""Write a checkpoint: the layout first, from names and shapes alone, then the bytes, one tensor after another.

Nothing appears under its final name before it is whole: files go into a sibling folder that takes the name at the end
(see `portllm.files.staging`), and that is removed when anything goes wrong.
"""

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from portllm.checkpoint.safetensors.header import render_header
from portllm.checkpoint.safetensors.names import INDEX_FILE, SINGLE_FILE
from portllm.errors import OutputError
from portllm.files import page_cache
from portllm.tensors.info import DTYPE_BITS, n_bytes_of

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
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
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
                f"'{self._path}': {self._written} bytes were written, but its header declares {self._expected}."
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
