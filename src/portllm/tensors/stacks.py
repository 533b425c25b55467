"""Whole tensors of one shape, read on top of each other into memory that is used again: for numpy, without torch."""

from collections.abc import Sequence

import numpy as np

from portllm.arrays import Float32
from portllm.tensors.bytes import read_into
from portllm.tensors.info import TensorInfo
from portllm.tensors.numbers import decode_floats

ALIGNMENT = 8
"""Bytes: each stack begins where any of its numbers may."""


class AlikeReader:
    """Reads for one thread; what a call returned is overwritten by the next.

    Memory that is asked for anew is given page by page, which takes longer than what is read into it.
    """

    def __init__(self) -> None:
        self._memory = bytearray()

    def read(self, *stacks: Sequence[TensorInfo]) -> tuple[Float32[np.ndarray, "n ..."], ...]:
        """The values of unencoded tensors of one local file, in float32; those of a stack have one shape and dtype.

        Raises:
            UnsupportedDtypeError: A tensor does not hold floating-point numbers of 16, 32 or 64 bits.
            CheckpointError: The file is gone or became shorter since it was opened.
        """
        places = []
        stop = 0
        for infos in stacks:
            start = -(-stop // ALIGNMENT) * ALIGNMENT
            stop = start + sum(info.n_bytes for info in infos)
            places.append((start, stop))
        if stop > len(self._memory):
            self._memory = bytearray(stop)
        memory = memoryview(self._memory)
        spans = []
        for infos, (start, _) in zip(stacks, places, strict=True):
            for info in infos:
                spans.append((info, memory[start : start + info.n_bytes]))
                start += info.n_bytes
        read_into(spans)
        return tuple(
            decode_floats(memory[start:stop], infos[0].dtype).reshape(len(infos), *infos[0].shape)
            for infos, (start, stop) in zip(stacks, places, strict=True)
        )
