"""Deltas combined by arithmetic on tensors: cut to a rank, or selected element by element."""

from collections.abc import Sequence

from torch import Tensor

from portllm.combining.plan import Combination, Exact, Selected
from portllm.errors import NonFiniteError
from portllm.patch.capture import Captured
from portllm.patch.combine import concatenate, rerank, select
from portllm.patch.delta import LowRankDelta
from portllm.tensors.info import TensorInfo
from portllm.tensors.tensors import load
from portllm.workers.one_thread import one_thread


def combined(
    deltas: Sequence[LowRankDelta[TensorInfo]], *, weights: Sequence[float], how: Combination, module: str
) -> Captured:
    """The deltas of one module as one.

    Raises:
        NonFiniteError: A factor contains an infinity or NaN.
    """
    loaded = [_loaded(delta, module) for delta in deltas]
    with one_thread():
        match how:
            case Exact(rank=rank):
                return rerank(concatenate(loaded, weights=weights), rank=rank if isinstance(rank, int) else None)
            case Selected(method=method, density=density, rank=rank, seed=seed):
                wanted = sum(delta.rank for delta in loaded) if rank is None else rank
                return select(
                    loaded, weights=weights, method=method, density=density, rank=wanted, seed=seed, name=module
                )


def _loaded(delta: LowRankDelta[TensorInfo], module: str) -> LowRankDelta[Tensor]:
    a, b = load(delta.a), load(delta.b)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise NonFiniteError(f"'{module}': a patch contains an infinity or NaN. The training run may have diverged.")
    return LowRankDelta(a=a, b=b, scale=delta.scale)
