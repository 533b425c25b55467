"""The values of a model with a patch on it, in float32, tensor by tensor: for running it layer by layer."""

from collections.abc import Sequence

from torch import Tensor

from portllm.capturing.stored_values import StoredValues
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.errors import CheckpointError
from portllm.matching.changes import changes_of
from portllm.methods.values import Values, take_rows, whole
from portllm.patch.delta import Change, LowRankDelta, RowValues, VectorDelta, WholeValue
from portllm.patch.merge import add, delta_rows, renormalize
from portllm.patch.patch import Patch
from portllm.tensors.tensors import load


class PatchedWeights:
    """What each tensor of a model becomes with a patch on it.

    Args:
        checkpoint: The model.
        patch: What fits it, with deltas the way round in which it stores its weights; None for the bare model.
    """

    def __init__(self, checkpoint: Checkpoint, patch: Patch[Values] | None) -> None:
        self._checkpoint = checkpoint
        changes: dict[str, Change[Values]] = {} if patch is None else changes_of(patch)
        self._changes = {checkpoint.current_name(name): change for name, change in changes.items()}

    def tensor(self, name: str) -> Tensor | None:
        """A whole tensor; None where the model has none."""
        info = self._checkpoint.tensor(name)
        return None if info is None else patched(load(info).float(), self._change(name), None)

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a matrix."""
        stored = StoredValues(self._checkpoint.tensor(name) or self._checkpoint.info(name))
        return patched(whole(take_rows(stored, rows)).float(), self._change(name), rows)

    def n_rows(self, name: str) -> int:
        """How many rows a matrix has."""
        return (self._checkpoint.tensor(name) or self._checkpoint.info(name)).shape[0]

    def _change(self, name: str) -> Change[Values] | None:
        change = self._changes.get(self._checkpoint.current_name(name))
        tied = self._checkpoint.tied_embedding
        is_head = self._checkpoint.current_name(name) == self._checkpoint.head_name
        if change is None and is_head and tied is not None:  # trained rows of a tied embedding are the head's too
            change = self._changes.get(self._checkpoint.current_name(tied.name))
            return change if isinstance(change, RowValues) else None
        return change


def patched(weight: Tensor, change: Change[Values] | None, rows: Sequence[int] | None) -> Tensor:
    """A weight with a change, in float32.

    Args:
        weight: The model's, whole or some rows.
        change: What a patch does to it.
        rows: Which rows these are; None for all.
    """
    match change:
        case None:
            return weight
        case LowRankDelta(a=a, b=b, scale=scale, transposed=transposed, magnitude=magnitude):
            factors = [whole(values).float() for values in (a, b)]
            if rows is not None:
                picked = factors[0][:, list(rows)] if transposed else factors[1][list(rows)]
                factors[0 if transposed else 1] = picked
            delta = delta_rows(factors[1], factors[0], scale=scale)
            exact = add(weight.T.contiguous() if transposed else weight, delta)
            if magnitude is not None:
                norms = whole(magnitude).float()
                exact = renormalize(exact, norms if rows is None or transposed else norms[list(rows)])
            return exact.T.contiguous() if transposed else exact
        case WholeValue(values):
            tuned = values if rows is None else take_rows(values, rows)
            return whole(tuned).float()
        case RowValues(values, places):
            return _with_rows(weight, whole(values).float(), places, rows)
        case VectorDelta(values, scale):
            return weight + scale * whole(values).float()
        case _:
            raise CheckpointError(f"a change of the kind {type(change).__name__} cannot be run layer by layer.")


def _with_rows(weight: Tensor, tuned: Tensor, places: Sequence[int], rows: Sequence[int] | None) -> Tensor:
    where = {row: place for place, row in enumerate(range(len(weight)) if rows is None else rows)}
    pairs = [(where[row], index) for index, row in enumerate(places) if row in where]
    result = weight.clone()
    if pairs:
        here, there = (list(side) for side in zip(*pairs, strict=True))
        result[here] = tuned[there]
    return result
