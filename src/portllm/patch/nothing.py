"""Does a patch change anything? An adapter that was never trained, or was saved without its values, adds zeros."""

from portllm.patch.delta import ExpertsDelta, LowRankDelta
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo
from portllm.tensors.windows import load_values

BLOCK_ELEMENTS = 1 << 14

Delta = LowRankDelta[TensorInfo] | ExpertsDelta[TensorInfo]


def why_nothing(patch: Patch[TensorInfo]) -> str | None:
    """Why a patch leaves every weight as it is; None for one that changes something.

    Reads the first numbers of each factor, and whole factors only where all of those are zero.
    """
    if patch.values or patch.rows or any(_changes(delta, most=BLOCK_ELEMENTS) for delta in _deltas(patch)):
        return None
    if not _deltas(patch) or any(map(_changes, _deltas(patch))):
        return None
    if any(bias.scale and has_values(bias.values) for bias in patch.bias_deltas.values()):
        return None
    why = (
        "lora_alpha is 0"
        if not any(delta.scale for delta in _deltas(patch))
        else "every lora_B is zero: the adapter was not trained, or was saved without its values"
    )
    return f"{patch.name} changes nothing: {why}. Save the adapter again after training."


def _deltas(patch: Patch[TensorInfo]) -> list[Delta]:
    return [*patch.deltas.values(), *patch.experts.values()]


def _changes(delta: Delta, *, most: int | None = None) -> bool:
    """Whether a delta is not zero, by all of its numbers or as many as are asked for."""
    if isinstance(delta, LowRankDelta) and delta.magnitude is not None:
        return True
    return bool(delta.scale) and has_values(delta.b, most=most) and has_values(delta.a, most=most)


def has_values(info: TensorInfo, *, most: int | None = None) -> bool:
    """Whether any number of a tensor, or of its first ones, is not zero."""
    count = info.n_params if most is None else min(most, info.n_params)
    starts = range(0, count, BLOCK_ELEMENTS)
    return any(load_values(info, start, min(start + BLOCK_ELEMENTS, count)).any() for start in starts)
