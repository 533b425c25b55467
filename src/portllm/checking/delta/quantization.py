"""How large quantization's part is beside a patch that was fitted to quantized weights, from sampled rows."""

from collections.abc import Iterator, Mapping

import numpy as np

from portllm.arrays import Float32
from portllm.checking.delta.measures import LOW_RANK, ChangeMeasures, runs_of
from portllm.checking.update.samples import SampledRows
from portllm.measures.four_bit import BLOCK_SIZE, SCHEMES, block_scales, requantized, stored_scales
from portllm.measures.quantization_gap import GapSums
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo
from portllm.tensors.rounding import round_to


def sample_gap(
    patch: Patch[TensorInfo], measured: Mapping[str, ChangeMeasures], rows: Mapping[str, SampledRows]
) -> GapSums | None:
    """`|W - dequant(quant(W))|²` over the weights that the patch was fitted to in 4 bit, beside its `|Δ|²`.

    The blocks of the sampled rows stand for those of the whole weight; with double quantization, so do their scales.

    Returns:
        The sums; None where the patch does not say that it was fitted to such weights, or none was sampled.
    """
    told = None if patch.record is None else patch.record.capture.fitted_to
    if told is None or told.scheme not in SCHEMES:
        return None
    total = GapSums()
    for name, found in measured.items():
        module = "." + name.removesuffix(WEIGHT)
        if found.kind != LOW_RANK or any(module.endswith(f".{end}") for end in told.left_alone):
            continue
        sampled = rows[name]
        values = np.concatenate([np.empty(0, np.float32), *_whole_blocks(sampled)])
        if len(values):
            scheme, scales = SCHEMES[told.scheme], block_scales(values)
            left = requantized(values, scales, stored_scales(scales, scheme), scheme)
            gap = values - round_to(left, sampled.pair.base.dtype)
            whole = sampled.pair.base.n_params / len(values)
            total += GapSums(whole * float(np.square(gap, dtype=np.float64).sum()), found.delta_sq)
    return total if total.delta_sq else None


def _whole_blocks(sampled: SampledRows) -> Iterator[Float32[np.ndarray, " n"]]:
    """The elements of each range of rows that fill blocks, which are counted from the weight's first element."""
    width, done = sampled.pair.width, 0
    for start, stop in runs_of(sampled.rows):
        values = sampled.base[done : done + stop - start].reshape(-1)
        done += stop - start
        first = -start * width % BLOCK_SIZE
        n_whole = max(0, len(values) - first) // BLOCK_SIZE * BLOCK_SIZE
        yield values[first : first + n_whole]
