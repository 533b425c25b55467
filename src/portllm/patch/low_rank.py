"""The plain low-rank deltas of a patch, loaded from its folder."""

from torch import Tensor

from portllm.patch.delta import LowRankDelta
from portllm.tensors.info import TensorInfo
from portllm.tensors.tensors import load


def load_delta(delta: LowRankDelta[TensorInfo]) -> LowRankDelta[Tensor]:
    """A plain delta with its factors in memory."""
    return LowRankDelta(
        a=load(delta.a),
        b=load(delta.b),
        scale=delta.scale,
        transposed=delta.transposed,
        is_embedding=delta.is_embedding,
    )
