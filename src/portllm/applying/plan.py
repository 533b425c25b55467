"""Which modules of a model in memory a patch changes, and every reason why it cannot be put on it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.errors import Refusal
from portllm.matching.changes import changes_of
from portllm.patch.delta import Change, LowRankDelta, RowValues, VectorDelta, WholeValue
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A change of a patch, and where it is made.

    Attributes:
        name: The tensor, as the patch names it.
        module: The module that has it.
        leaf: The parameter in that module.
        change: What the patch does to it.
    """

    name: str
    module: nn.Module
    leaf: str
    change: Change[TensorInfo]

    @property
    def is_added(self) -> bool:
        """Whether the module's output gets something added; everything else stands in the place of the parameter."""
        return isinstance(self.change, LowRankDelta) and self.change.magnitude is None


@dataclass(frozen=True, slots=True)
class ApplyPlan:
    """A patch about to be put on a model.

    Attributes:
        sites: What is changed.
        refusals: Every reason not to.
    """

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]


def plan_apply(patch: Patch[TensorInfo], model: nn.Module, *, base: Checkpoint | None = None) -> ApplyPlan:
    """Find the place of each change of a patch in a model.

    Args:
        patch: The patch.
        model: The model, as its class names its modules.
        base: The files that it was loaded from, which know other spellings of its names.
    """
    modules = dict(model.named_modules())
    sites: list[Site] = []
    refusals = list(_unheld(patch))
    for name, change in changes_of(patch).items():
        found = _find(name, modules, base)
        if found is None:
            refusals.append(Refusal(name, f"the patch changes it, but {type(model).__name__} has no such parameter."))
            continue
        site = Site(name, *found, change)
        sites.append(site)
        if problem := _mismatch(site):
            refusals.append(Refusal(name, problem))
    return ApplyPlan(tuple(sites), tuple(sorted(refusals)))


def _unheld(patch: Patch[TensorInfo]) -> Iterator[Refusal]:
    merged = f"Merge it instead: portllm merge {patch.name} --into BASE -o MODEL."
    for name in patch.experts:
        yield Refusal(name, f"adapts all experts of a layer at once, which no module returns apart. {merged}")
    for name in patch.resized:
        yield Refusal(name, f"has rows for tokens that the model lacks. {merged}")


def _find(name: str, modules: Mapping[str, nn.Module], base: Checkpoint | None) -> tuple[nn.Module, str] | None:
    """The module and parameter of a name; by its current spelling where the model has none of this one."""
    for spelled in (name, *(() if base is None else (base.current_name(name),))):
        path, _, leaf = spelled.rpartition(".")
        if path in modules and isinstance(getattr(modules[path], leaf, None), nn.Parameter):
            return modules[path], leaf
    return None


def _mismatch(site: Site) -> str | None:
    """Why a change does not fit its parameter; None where it does."""
    parameter = getattr(site.module, site.leaf)
    match site.change:
        case LowRankDelta() as delta:
            given, expected = (delta.a.shape[1], delta.b.shape[0]), _sizes(site.module)
            if expected is None:
                return f"is a {type(site.module).__name__}, which is no linear module or embedding."
            if given != expected:
                return (
                    f"the delta is (in={given[0]}, out={given[1]}), the module (in={expected[0]}, out={expected[1]})."
                )
        case RowValues(values, rows):
            if values.shape[1:] != tuple(parameter.shape[1:]) or max(rows) >= parameter.shape[0]:
                return (
                    f"the patch has rows of {values.shape[1:]} up to {max(rows)}, the model {tuple(parameter.shape)}."
                )
        case WholeValue(values) | VectorDelta(values):
            if values.shape != tuple(parameter.shape):
                return f"the patch has shape {values.shape}, the model {tuple(parameter.shape)}."
    if not site.is_added and not parameter.is_floating_point():
        return f"is stored as {parameter.dtype}; a value can only stand in for one of floating point."
    return None


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """What a module takes and returns; for an embedding, how many tokens it takes."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Linear):  # quantized ones too
        return module.in_features, module.out_features
    sizes = getattr(module, "nx", None), getattr(module, "nf", None)  # transformers' Conv1D
    return (sizes[0], sizes[1]) if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None
