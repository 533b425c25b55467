"""The commonest change in one pass over memory: a plain LoRA delta on a weight in bfloat16 or float32 that stays so.

`Q(W + s·B·A)` is made by `portllm.native`, element by element while a block is in the processor's cache, with the sums
that tell what rounding took. The bytes are those of `merging.with_torch`, which takes three times as long and has
torch to load first: that alone would take longer than a small model.
"""

from functools import partial
from types import ModuleType

import numpy as np

from portllm.arrays import Float32
from portllm.merging.blocks import FEWEST_ROWS, Block, BlockKernel, SourceBlock, Workspace, require_finite
from portllm.merging.plan import MergeStep
from portllm.merging.rounding_modes import Nearest, Rounding
from portllm.native import kernels
from portllm.patch.delta import LowRankDelta
from portllm.patch.rounding import MergeSums
from portllm.tensors.info import TensorInfo
from portllm.tensors.windows import load_values

STORED = ("BF16", "F32")
"""Dtypes of weights that the loops are written for."""

FACTORS = ("F32", "BF16", "F16")
"""Dtypes of factors that float32 holds exactly."""

MOST_TERMS = 128
"""Rank up to which products have the bits of torch's: MKL was seen to add up to 192 terms in their order, as the loops
do, and to cut sums of 256 into parts. PEFT's bytes come from there."""


def can_fuse(step: MergeStep, rounding: Rounding, device: str) -> bool:
    """Whether a step is one that `fused` makes."""
    change = step.change
    return (
        kernels is not None
        and device == "cpu"
        and isinstance(rounding, Nearest)
        and isinstance(change, LowRankDelta)
        and not change.transposed
        and change.magnitude is None
        and step.source.encoding is None
        and step.source.dtype == step.entry.dtype
        and step.source.dtype in STORED
        and {change.a.dtype, change.b.dtype} <= {*FACTORS}
        and change.rank <= MOST_TERMS
        and min(change.shape) >= FEWEST_ROWS
    )


def fused(step: MergeStep, bench: Workspace) -> BlockKernel:
    """What makes the blocks of a step; it keeps the factors.

    The function that it returns raises NonFiniteError where a value is infinite or not a number, or becomes so in the
    storage dtype.

    Raises:
        CheckpointError: The patch cannot be read.
    """
    delta = step.change
    if kernels is None or not isinstance(delta, LowRankDelta):
        raise AssertionError("asked for only where `can_fuse` says so")
    return partial(_fused, kernels, step, _factor(delta.a), _factor(delta.b), delta.scale, bench)


def _fused(
    kernels: ModuleType,
    step: MergeStep,
    a: Float32[np.ndarray, "rank d_in"],
    b: Float32[np.ndarray, "d_out rank"],
    scale: float,
    bench: Workspace,
    stored: SourceBlock,
) -> Block:
    out = bench.room(len(stored.data))
    of_rows = b[stored.start : stored.stop]
    sums = MergeSums(*kernels.merge(stored.data, of_rows, a, scale, out, len(a), step.entry.dtype == "F32"))
    require_finite(sums, step, stored)
    return Block(out, sums)


def _factor(info: TensorInfo) -> Float32[np.ndarray, "rows columns"]:
    return np.ascontiguousarray(load_values(info, 0, info.n_params).reshape(info.shape))
