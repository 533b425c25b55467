"""Measure what a merge adds beside the patch, because the patch was fitted to quantized weights.

The weights are read once more, in blocks; what quantization made of them is read too, or computed as bitsandbytes does.
"""

from collections.abc import Callable, Mapping

import numpy as np

from portllm.arrays import Float32
from portllm.matching.quantized_base import Fitted
from portllm.measures.four_bit import BLOCK_SIZE, SCHEMES, FourBitScheme, block_scales, requantized, stored_scales
from portllm.measures.quantization_gap import GapSums, QuantizationGap
from portllm.merging.plan import MergePlan, MergeStep
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.delta import LowRankDelta
from portllm.patch.rounding import MergeSums
from portllm.progress import Progress, silent
from portllm.tensors.info import TensorInfo
from portllm.tensors.rounding import round_to
from portllm.tensors.windows import load_values

BLOCK_ELEMENTS = 1 << 17
"""Elements at once: few enough for a processor's cache, in which a dozen passes go over them."""

Values = Callable[[int, int], Float32[np.ndarray, " n"]]
"""The elements of a tensor from one number to another."""


def measure_gap(
    plan: MergePlan, fitted: Fitted, sums: Mapping[str, MergeSums], *, progress: Progress = silent
) -> QuantizationGap:
    """How large `W - dequant(quant(W))` is beside the delta, for each changed weight that was quantized.

    Args:
        plan: The merge.
        fitted: What the deltas were fitted to.
        sums: The sizes of the deltas, by tensor.
        progress: Progress callback (bytes of values compared).
    """
    steps = {name: step for name, step in plan.steps.items() if name in sums and _was_quantized(name, step, fitted)}
    total = sum(step.source.n_params for step in steps.values())
    done = 0
    tensors: dict[str, GapSums] = {}
    for name, step in steps.items():
        stored = fitted.weights.get(step.source.name)
        gap_sq = _stored_gap(step.source, stored) if stored else _computed_gap(step, SCHEMES[fitted.scheme])
        tensors[name] = GapSums(gap_sq, sums[name].delta_sq)
        done += step.source.n_params
        progress("quantization", 4 * done, 4 * total, "bytes")
    return QuantizationGap(fitted.scheme, fitted.source, tensors)


def _was_quantized(name: str, step: MergeStep, fitted: Fitted) -> bool:
    if not isinstance(step.change, LowRankDelta) or step.change.is_embedding:
        return False
    if fitted.weights:
        return step.source.name in fitted.weights
    module = "." + name.removesuffix(WEIGHT)
    return not any(module.endswith("." + end) for end in fitted.left_alone)


def _stored_gap(weight: TensorInfo, stored: TensorInfo) -> float:
    return sum(
        _square_sum(load_values(weight, start, stop) - load_values(stored, start, stop))
        for start, stop in _blocks(weight.n_params)
    )


def _computed_gap(step: MergeStep, scheme: FourBitScheme) -> float:
    """The scales of the whole tensor come first: double quantization takes off their mean."""
    values, count = _values_of(step), step.source.n_params
    scales = np.concatenate([block_scales(values(*span)) for span in _blocks(count)])
    stored = stored_scales(scales, scheme)
    gap_sq = 0.0
    for start, stop in _blocks(count):
        part = values(start, stop)
        of_part = slice(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE))
        left = round_to(requantized(part, scales[of_part], stored[of_part], scheme), step.source.dtype)
        gap_sq += _square_sum(part - left)
    return gap_sq


def _values_of(step: MergeStep) -> Values:
    """The weight's elements in the order in which they are quantized: as (d_out, d_in), however the file has them."""
    info = step.source
    if isinstance(step.change, LowRankDelta) and step.change.transposed:
        turned = load_values(info, 0, info.n_params).reshape(info.shape).T.reshape(-1)
        return lambda start, stop: turned[start:stop]
    return lambda start, stop: load_values(info, start, stop)


def _blocks(count: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK_ELEMENTS, count)) for start in range(0, count, BLOCK_ELEMENTS)]


def _square_sum(values: Float32[np.ndarray, " n"]) -> float:
    return float(np.square(values, dtype=np.float64).sum())
