"""Tensors on their way to a file whose header cannot be written yet: put down one by one, read again as any other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from portllm.arrays import Float32
from portllm.files.source import LocalFile
from portllm.tensors.info import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

SPOOL_FILE = ".spool"
"""Its name in a staged folder, which is gone before the folder takes its place."""


@dataclass(slots=True)
class SpoolEntry:
    """A tensor that is being put down in parts.

    Attributes:
        spool: Where to.
        info: What it will be read as; valid when all parts are there.
    """

    spool: "Spool"
    info: TensorInfo

    def append(self, data: bytes | memoryview) -> None:
        """Its next bytes."""
        self.spool.write(data)

    def append_tensor(self, tensor: "Tensor") -> None:
        """Its next rows."""
        from portllm.tensors.tensors import encode  # loads torch, which whoever has a tensor has loaded

        self.spool.write(encode(tensor))


class Spool:
    """A file of tensors' bytes without a header, which is gone when the block ends.

    Threads may put down tensors at the same time: while one is being written, the others wait.

    Example:
        >>> import tempfile, torch
        >>> from portllm.tensors.tensors import load
        >>> with tempfile.TemporaryDirectory() as folder, Spool(Path(folder) / "spool") as spool:
        ...     load(spool.add("w", torch.tensor([[1.0, 2.0]])))
        tensor([[1., 2.]])
    """

    def __init__(self, path: Path) -> None:
        self._path = LocalFile(path)
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self._written = 0
        self._lock = Lock()

    def add(self, name: str, tensor: "Tensor") -> TensorInfo:
        """Put down one tensor."""
        from portllm.tensors.tensors import DTYPE_NAMES

        with self.writing(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) as entry:
            entry.append_tensor(tensor)
        return entry.info

    def add_values(self, name: str, values: Float32[np.ndarray, "..."]) -> TensorInfo:
        """Put down one tensor of float32."""
        with self.writing(name, "F32", values.shape) as entry:
            entry.append(np.ascontiguousarray(values, "<f4").data)
        return entry.info

    @contextmanager
    def writing(self, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[SpoolEntry]:
        """Put down one tensor in parts."""
        with self._lock:
            start = self._written
            entry = SpoolEntry(self, TensorInfo(name, dtype, shape, self._path, start, start))
            yield entry
            entry.info = TensorInfo(name, dtype, shape, self._path, start, self._written)

    def write(self, data: bytes | memoryview) -> None:
        """Bytes of the tensor that is being put down."""
        view = memoryview(data).cast("B")
        while view:
            count = self._file.write(view) or 0
            self._written += count
            view = view[count:]

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        os.unlink(self._path.path)
