"""Noise for stochastic rounding: a pure function of seed, tensor and place, so that no block size can change it."""

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from portllm.arrays import Int32

PER_DRAW = 16
"""Numbers of 16 bits in one draw of the Philox generator, which is what it can skip by."""


def rounding_noise(*, seed: int, tensor: str, start: int, count: int) -> Int32[Tensor, " count"]:
    """Numbers `start` to `start + count` of a tensor's stream, uniform in [0, 2^16).

    Example:
        >>> whole = rounding_noise(seed=0, tensor="w", start=0, count=100)
        >>> bool((rounding_noise(seed=0, tensor="w", start=37, count=9) == whole[37:46]).all())
        True
    """
    key = int.from_bytes(blake3(f"portllm rounding 1\0{seed}\0{tensor}".encode()).digest(16), "little")
    generator = np.random.Philox(key=key)
    generator.advance(start // PER_DRAW)
    skipped = start % PER_DRAW
    raw = generator.random_raw(-(-(skipped + count) // 4)).astype("<u8").view("<u2")
    return torch.from_numpy(raw[skipped : skipped + count].astype(np.int32))
