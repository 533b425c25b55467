"""Capture the deltas of all experts of a layer from two models, one expert after the other."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from portllm.checkpoint.header import TensorInfo
from portllm.checkpoint.tensors import load
from portllm.errors import NonFiniteError
from portllm.linalg import square_sum
from portllm.patch.capture import Captured, capture_low_rank
from portllm.patch.delta import ExpertsDelta
from portllm.pipeline.tuned_plan import ExpertsPair


def capture_experts(
    name: str, pair: ExpertsPair, *, rank: int | None, max_rank: int | None
) -> tuple[ExpertsDelta[Tensor] | None, Captured, float]:
    """The deltas of all experts, what they are and leave out together, and |W0|².

    Experts get the rank of the one that needs the most; the factors of the others end in zeros. The delta is None
    where nothing of any difference is kept.

    Raises:
        NonFiniteError: A weight holds an infinity or NaN.
    """
    found: list[Captured] = []
    base_sq = 0.0
    for left, right in zip(pair.base, pair.tuned, strict=True):
        base, tuned = _stacked(left), _stacked(right)
        if not (base.isfinite().all() and tuned.isfinite().all()):
            raise not_finite(name)
        base_sq += square_sum(base)
        found.append(capture_low_rank(base, tuned, rank=rank, max_rank=max_rank))
    total = Captured(
        None,
        math.fsum(one.difference_sq for one in found),
        math.fsum(one.residual_sq for one in found),
        max(one.noise_edge for one in found),
    )
    return _together(found, pair.shape), total, base_sq


def are_equal(pair: ExpertsPair, base: Mapping[str, str], tuned: Mapping[str, str]) -> bool:
    """Whether both models store the same experts alike, by the digests of their tensors."""
    left, right = ([info for matrices in side for info in matrices] for side in (pair.base, pair.tuned))
    return [(info.dtype, info.shape, base[info.name]) for info in left] == [
        (info.dtype, info.shape, tuned[info.name]) for info in right
    ]


def not_finite(name: str) -> NonFiniteError:
    """What is said of a weight that holds something else than numbers."""
    return NonFiniteError(
        f"'{name}': the base or the tuned model holds an infinity or NaN. Look for a training run that diverged."
    )


def _stacked(matrices: tuple[TensorInfo, ...]) -> Float[Tensor, "d_out d_in"]:
    return torch.cat([load(info) for info in matrices])


def _together(found: list[Captured], shape: tuple[int, int]) -> ExpertsDelta[Tensor] | None:
    """The factors as PEFT stacks them; see `ExpertsDelta`."""
    rank = max(one.rank for one in found)
    if not rank:
        return None
    a = torch.zeros(len(found), rank, shape[1])
    b = torch.zeros(shape[0], rank, len(found))
    for number, one in enumerate(found):
        if one.delta is not None:
            a[number, : one.rank] = one.delta.a
            b[:, : one.rank, number] = one.delta.b
    return ExpertsDelta(a=a.reshape(-1, shape[1]), b=b.reshape(shape[0], -1), scale=1.0, rank=rank)
