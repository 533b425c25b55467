"""Tensors that are too many for memory, in files without a name: the system takes them out of memory, and back.

What a mapped file holds can be written to the disk where memory is short; what a program has allocated cannot.
"""

import ctypes
import math
import os
import tempfile
from collections.abc import Hashable
from pathlib import Path

import torch
from torch import Tensor

from portllm.arrays import Float32
from portllm.errors import OutputError

MAPPED_BYTES = 1 << 16
"""Of a tensor that lies on disk, at least."""

CPU = torch.device("cpu")


class Spool:
    """Room for tensors, by what they are for.

    Args:
        folder: Where the files lie that nobody sees.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     spool = Spool(Path(folder))
        ...     kept = spool.keep("states", torch.ones(200, 100))
        ...     float(kept.sum()), list(Path(folder).iterdir())
        (20000.0, [])
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rooms: dict[Hashable, Tensor] = {}

    def room(self, key: Hashable, *shape: int, device: torch.device = CPU) -> Float32[Tensor, "..."]:
        """A tensor to be filled: the one of an earlier call with the same key, where it has the shape.

        Raises:
            OutputError: The disk is full.
        """
        room = self._rooms.get(key)
        if room is None or room.shape != shape:
            self._rooms.pop(key, None)
            self._rooms[key] = room = self._new(shape, device)
        return room

    def keep(self, key: Hashable, values: Float32[Tensor, "..."]) -> Float32[Tensor, "..."]:
        """The same values in the room of a key, in the place of what was there."""
        return self.room(key, *values.shape, device=values.device).copy_(values)

    def _new(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        size = math.prod(shape)
        n_bytes = size * torch.float32.itemsize
        if device != CPU or n_bytes < MAPPED_BYTES:
            return torch.empty(shape, device=device)
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".spool-") as file:
                if hasattr(os, "posix_fallocate"):  # a full disk is an error here; on a write, the process's end
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
                return torch.from_file(file.name, shared=True, size=size, dtype=torch.float32).view(shape)
        except OSError as error:
            raise OutputError(
                f"'{self._folder}': no room for {n_bytes} more bytes of states ({error.strerror}). Free some disk, "
                "write to another one, or pass fewer prompts."
            ) from error


def give_back_freed() -> None:
    """Give memory back to the system that was freed and that the C library holds for later, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
