"""What only the patch has: classifier and reward heads, which are of no tensor of the base and travel as they are."""

from collections.abc import Collection
from dataclasses import replace
from typing import TypeVar

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.patch.delta import Factor
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo

F = TypeVar("F", bound=Factor)


def own_values(patch: Patch[TensorInfo], *models: Checkpoint) -> frozenset[str]:
    """The tensors that a patch holds whole and one of the models lacks: those of its heads.

    A head stands outside the layers, and is not a tensor of the model under a name that only begins otherwise.

    Args:
        patch: What may have them.
        *models: Those that it is held against.
    """
    return frozenset(name for name in patch.values if any(_is_lacking(name, model) for model in models))


def _is_lacking(name: str, model: Checkpoint) -> bool:
    if model.tensor(name) is not None or any(part.isdigit() for part in name.split(".")):
        return False
    return not any(other.endswith(f".{name}") or name.endswith(f".{other}") for other in model.tensors)


def without(patch: Patch[F], names: Collection[str]) -> Patch[F]:
    """The patch without some of its whole values."""
    if not names:
        return patch
    return replace(patch, values={name: value for name, value in patch.values.items() if name not in names})
