"""The plain low-rank deltas of a patch, loaded from its folder."""

from torch import Tensor

from portllm.checkpoint.reading.tensors import load
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.patch.delta import LowRankDelta
from portllm.patch.patch import Patch


def is_plain_lora(patch: Patch[TensorInfo]) -> bool:
    """Whether a patch is made of LoRA deltas alone."""
    if patch.values or patch.rows or patch.bias_deltas or patch.experts:
        return False
    return all(delta.magnitude is None for delta in patch.deltas.values())


def load_delta(delta: LowRankDelta[TensorInfo]) -> LowRankDelta[Tensor]:
    """A plain delta with its factors in memory."""
    return LowRankDelta(
        a=load(delta.a),
        b=load(delta.b),
        scale=delta.scale,
        transposed=delta.transposed,
        is_embedding=delta.is_embedding,
    )
