"""The exact sum of deltas: their factors side by side, which takes no library for tensors."""

import math
from collections.abc import Sequence

import numpy as np

from portllm.arrays import Float32
from portllm.errors import NonFiniteError
from portllm.patch.delta import LowRankDelta
from portllm.tensors.bytes import read_bytes
from portllm.tensors.info import TensorInfo
from portllm.tensors.windows import load_values

Numbers = np.ndarray[tuple[int, ...], np.dtype[np.floating]]
Factors = tuple[Float32[np.ndarray, "..."], Float32[np.ndarray, "..."]]
"""A, of shape (rank, d_in), and B, of shape (d_out, rank)."""


def side_by_side(deltas: Sequence[LowRankDelta[TensorInfo]], *, weights: Sequence[float], module: str) -> Factors:
    """`Σ w_i Δ_i` as `A = [A_1; A_2; ...]` and `B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]`, ranks added up.

    In float32 (float64 where a factor is); the one rounding before the last is that of `w_i s_i B_i`.

    Raises:
        NonFiniteError: A factor contains an infinity or NaN.
    """
    a, b = [values_of(delta.a) for delta in deltas], [values_of(delta.b) for delta in deltas]
    if not all(np.isfinite(factor).all() for factor in (*a, *b)):
        raise NonFiniteError(f"'{module}': a patch contains an infinity or NaN. The training run may have diverged.")
    dtype = np.result_type(*a, *b)
    scaled = [
        factor.astype(dtype) * dtype.type(weight * delta.scale)
        for factor, delta, weight in zip(b, deltas, weights, strict=True)
    ]
    return np.concatenate(a).astype(np.float32), np.concatenate(scaled, axis=1).astype(np.float32)


def values_of(info: TensorInfo) -> Numbers:
    """A whole tensor in float32, or in float64 where it is stored so."""
    if info.dtype == "F64":
        return np.frombuffer(read_bytes(info), "<f8").reshape(info.shape)
    return load_values(info, 0, math.prod(info.shape)).reshape(info.shape)
