"""What a patch does to a model, by the name of the tensor it is done to."""

from collections.abc import Hashable
from dataclasses import replace
from typing import TypeVar

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.matching.experts import expert_changes
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.delta import Change, Factor, LowRankDelta, RowValues, VectorDelta, WholeValue
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo

F = TypeVar("F", bound=Factor)


def oriented(patch: Patch[TensorInfo], checkpoint: Checkpoint) -> Patch[TensorInfo]:
    """The patch with each delta the way round in which the model stores the weight.

    `fan_in_fan_out` is one word for all modules, and PEFT corrects it module by module when it loads an adapter: a
    GPT-2 adapter of Conv1D layers and the head may say either. Where the model's family is known it is asked instead.
    """
    turned = {}
    for module, delta in patch.deltas.items():
        is_transposed = checkpoint.is_transposed(module)
        if is_transposed is not None and delta.transposed != (delta.is_embedding or is_transposed):
            turned[module] = replace(delta, transposed=not delta.transposed)
    experts = {
        name: replace(delta, transposed=True)
        for name, delta in patch.experts.items()
        if checkpoint.has_transposed_experts(name) and not delta.transposed
    }
    is_as_it_was = not (turned or experts)
    return (
        patch
        if is_as_it_was
        else replace(patch, deltas={**patch.deltas, **turned}, experts={**patch.experts, **experts})
    )


def changes_on(patch: Patch[TensorInfo], checkpoint: Checkpoint) -> dict[str, Change[TensorInfo]]:
    """What a patch that fits a model does, by the name of the tensor in the model; a tied head has a name too."""
    changes: dict[str, Change[TensorInfo]] = {}
    for name, change in changes_of(patch).items():
        tensor = checkpoint.stored(name)
        changes[checkpoint.current_name(name) if tensor is None else tensor.name] = change
    for name, delta in patch.experts.items():
        changes |= expert_changes(name, delta, checkpoint)
    return changes


def changes_of(patch: Patch[F]) -> dict[str, Change[F]]:
    """What a patch does, by the name that it has for the tensor it is done to; all but experts."""
    return {
        **{module + WEIGHT: delta for module, delta in patch.deltas.items()},
        **patch.values,
        **patch.rows,
        **patch.bias_deltas,
    }


def outline(patch: Patch[TensorInfo]) -> Hashable:
    """All that `mismatches` asks of a patch: the same for patches of one recipe, however they were trained."""
    return (
        repr(patch.config.fields),
        tuple((name, _outline(change)) for name, change in changes_of(patch).items()),
        tuple((name, delta.a.shape, delta.b.shape, delta.rank) for name, delta in patch.experts.items()),
        tuple((name, tuple(copy.shape for copy in copies)) for name, copies in patch.base_copies.items()),
    )


def _outline(change: Change[TensorInfo]) -> Hashable:
    match change:
        case LowRankDelta():
            return change.a.shape, change.b.shape, change.transposed, change.is_embedding
        case RowValues(values, rows):
            return values.shape, rows
        case WholeValue(values) | VectorDelta(values):
            return type(change), values.shape
        case _:
            raise TypeError(f"{change} is of an expert")
