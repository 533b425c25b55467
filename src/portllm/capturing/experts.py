"""Capture the deltas of all experts of a layer from two models, one expert after the other."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from portllm.arrays import Float
from portllm.capturing.tensor import CapturedTensor, Compared, Known, not_finite
from portllm.capturing.tuned_plan import ExpertsPair, TunedPlan
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import are_stored_alike
from portllm.checkpoint.model.experts import Experts
from portllm.checkpoint.model.identity import digest_stored
from portllm.linalg import square_sum
from portllm.patch.capture import Captured, capture_low_rank
from portllm.patch.delta import ExpertsDelta
from portllm.tensors.info import TensorInfo
from portllm.tensors.spool import Spool
from portllm.tensors.tensors import load


def compare_experts(name: str, plan: TunedPlan, *, known: Known, spool: Spool) -> Compared:
    """The deltas of all experts, what they are and what they leave out together.

    Experts get the rank of the one that needs the most; the factors of the others end in zeros.

    Raises:
        NonFiniteError: A weight holds an infinity or NaN.
    """
    pair = plan.experts[name]
    digests = _digests(plan.base, pair.base, known[0]), _digests(plan.tuned, pair.tuned, known[1])
    if are_equal(pair, *digests):
        return Compared(digests, CapturedTensor(0.0, 0.0))
    found: list[Captured] = []
    base_sq = 0.0
    for left, right in zip(pair.base, pair.tuned, strict=True):
        base, tuned = _stacked(left), _stacked(right)
        if not (base.isfinite().all() and tuned.isfinite().all()):
            raise not_finite(name)
        base_sq += square_sum(base)
        if pair.transposed:
            base, tuned = base.T, tuned.T
        found.append(capture_low_rank(base, tuned, rank=plan.rank, max_rank=plan.max_rank))
    delta = _together(found, pair.shape)
    measured = CapturedTensor(
        base_sq,
        math.fsum(one.difference_sq for one in found),
        None if delta is None else delta.rank,
        math.fsum(one.residual_sq for one in found),
        max((one.noise_edge for one in found if one.noise_edge is not None), default=None),
    )
    if delta is None:
        return Compared(digests, measured)
    a, b = spool.add(f"{name}.lora_A", delta.a), spool.add(f"{name}.lora_B", delta.b)
    return Compared(digests, measured, ExpertsDelta(a=a, b=b, scale=1.0, rank=delta.rank, transposed=pair.transposed))


def are_equal(pair: ExpertsPair, base: Mapping[str, str], tuned: Mapping[str, str]) -> bool:
    """Whether both models store the same experts alike, as far as the digests of their tensors are known."""
    left, right = ([info for matrices in side for info in matrices] for side in (pair.base, pair.tuned))
    return len(left) == len(right) and all(
        are_stored_alike(mine, theirs, base, tuned) for mine, theirs in zip(left, right, strict=True)
    )


def _digests(checkpoint: Checkpoint, experts: Experts, known: Mapping[str, str]) -> dict[str, str]:
    """Of the tensors that experts are in."""
    names = sorted({info.name for matrices in experts for info in matrices})
    return {part: digest for name in names for part, digest in digest_stored(checkpoint.infos[name], known).items()}


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
