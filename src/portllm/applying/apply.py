"""Put a patch on a model that is in memory, and take it off again bit for bit.

Nothing is merged. A low-rank delta is a hook that adds `s · B A x` to what its module returns, in the order in which
PEFT computes it, so that the logits are PEFT's. What replaces a value (saved modules, biases, token rows, weights of
DoRA) is a parameter that stands in for the model's own, which is kept, and put back as the same object.
"""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from portllm.applying.plan import Site, plan_apply
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.errors import NonFiniteError, PortLLMError, Refusal, refuse
from portllm.matching.base import base_mismatch
from portllm.matching.changes import oriented
from portllm.patch.adapter_folder import PatchLike, load_patch
from portllm.patch.delta import LowRankDelta, RowValues, VectorDelta, WholeValue
from portllm.patch.identify import identify
from portllm.patch.merge import delta_rows, renormalize
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo
from portllm.tensors.tensors import load


class Applied:
    """A patch on a model in memory: on until it is turned off, or to the end of a `with` block.

    Several patches can be on one model. Those that are on add up, as those of PEFT's `set_adapter` with a list do.

    Attributes:
        patch: The patch.
        is_on: Whether the model answers with it.
    """

    def __init__(self, model: nn.Module, patch: Patch[TensorInfo], changes: "list[_Added | _StoodFor]") -> None:
        self.patch = patch
        self.is_on = False
        self._model = model
        self._changes = changes

    def __repr__(self) -> str:
        return f"Applied({self.patch.name!r}, {'on' if self.is_on else 'off'}, {len(self._changes)} tensors)"

    def on(self) -> Self:
        """The model answers with the patch.

        Raises:
            PortLLMError: Another patch that is on has replaced a value that this one replaces.
        """
        if not self.is_on:
            taken = next((name for change in self._changes if (name := change.taken) is not None), None)
            if taken is not None:
                raise PortLLMError(f"'{taken}': another patch on this model replaces it; turn that one off first.")
            for change in self._changes:
                change.put()
            self.is_on = True
        return self

    def off(self) -> None:
        """The model is, bit for bit, as it was without the patch."""
        if self.is_on:
            for change in reversed(self._changes):
                change.take_back()
            self.is_on = False

    def swap(self, patch: PatchLike, *, base: ModelLike | None = None, allow_other_base: bool = False) -> None:
        """Put another patch in the place of this one, such as the ported one in that of the old.

        It is read and checked first, so that the old one stays where the new one does not fit. Swap between two
        forward passes: one that is running would have layers of both.

        Raises:
            PlanRefusedError, NonFiniteError: As `apply`.
        """
        other = _prepared(self._model, patch, base=base, allow_other_base=allow_other_base)
        was_on = self.is_on
        self.off()
        self.patch, self._changes = other.patch, other._changes
        if was_on:
            self.on()

    def __enter__(self) -> Self:
        return self.on()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.off()


def apply(
    model: nn.Module, patch: PatchLike, *, base: ModelLike | None = None, allow_other_base: bool = False
) -> Applied:
    """Put a patch on a transformers model that is in memory.

    Args:
        model: The model that the patch belongs to, not wrapped by PEFT; its dtype and devices stay.
        patch: The patch.
        base: The files that `model` was loaded from, whose fingerprint is compared with the patch's base; where
            nothing is said, its `name_or_path`, if that is a folder.
        allow_other_base: Accept a model other than the one the patch was made on.

    Returns:
        The patch on the model: `off()` takes it off, `on()` puts it on again, `swap(other)` exchanges it, and a `with`
        block ends with it off.

    Raises:
        PlanRefusedError: The patch does not fit the model, belongs to another one, or has parts that no module of a
            running model has a place for; lists every reason.
        NonFiniteError: The patch contains an infinity or NaN.

    Example:
        >>> with portllm.apply(model, "patch-v2"):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    return _prepared(model, patch, base=base, allow_other_base=allow_other_base).on()


def _prepared(model: nn.Module, patch: PatchLike, *, base: ModelLike | None, allow_other_base: bool) -> Applied:
    loaded = load_patch(patch)
    files = _files_of(model) if base is None else open_checkpoint(base)
    refusals: list[Refusal] = []
    if files is not None:
        loaded = oriented(loaded, files)
        refusals += base_mismatch(
            loaded, identify(files), model=files, option="base", allow_other_base=allow_other_base
        )
    plan = plan_apply(loaded, model, base=files)
    refuse([*refusals, *plan.refusals])
    return Applied(model, loaded, [_Added(site) if site.is_added else _StoodFor(site, model) for site in plan.sites])


def _files_of(model: nn.Module) -> Checkpoint | None:
    name = getattr(model, "name_or_path", "")
    return open_checkpoint(name) if name and Path(name).is_dir() else None


class _Added:
    """What a module's output gets added."""

    taken = None
    """Deltas add up."""

    def __init__(self, site: Site) -> None:
        assert isinstance(site.change, LowRankDelta)
        self._module = site.module
        place = getattr(site.module, site.leaf).device
        self._a, self._b = (_finite(load(factor), site).to(place) for factor in (site.change.a, site.change.b))
        self._scale = site.change.scale
        self._is_embedding = site.change.is_embedding
        self._remove: Callable[[], None] | None = None

    def put(self) -> None:
        self._remove = self._module.register_forward_hook(self._add).remove

    def take_back(self) -> None:
        if self._remove is not None:
            self._remove()
            self._remove = None

    def _add(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        read = embedding(inputs[0], self._a.T) if self._is_embedding else inputs[0].to(self._a.dtype) @ self._a.T
        return (output + (read @ self._b.T) * self._scale).to(output.dtype)


class _Standin(nn.Parameter):
    """A parameter in the place of the model's own."""


class _StoodFor:
    """A value that another one stands in for."""

    def __init__(self, site: Site, model: nn.Module) -> None:
        self._name = site.name
        own = getattr(site.module, site.leaf)
        is_shared = isinstance(site.change, RowValues)  # of a tied embedding, these rows are the head's too
        places = (
            (module, leaf) for module in model.modules() for leaf, value in module._parameters.items() if value is own
        )
        self._places = list(places) if is_shared else [(site.module, site.leaf)]
        self._value = _value_of(site, own.detach())
        self._kept: list[nn.Parameter | None] = []

    @property
    def taken(self) -> str | None:
        """Its name, where another patch has replaced it."""
        is_taken = any(isinstance(module._parameters[leaf], _Standin) for module, leaf in self._places)
        return self._name if is_taken else None

    def put(self) -> None:
        self._kept = [module._parameters[leaf] for module, leaf in self._places]
        standin = _Standin(self._value, requires_grad=False)
        for module, leaf in self._places:
            module._parameters[leaf] = standin

    def take_back(self) -> None:
        for (module, leaf), own in zip(self._places, self._kept, strict=True):
            module._parameters[leaf] = own
        self._kept = []


def _value_of(site: Site, own: Tensor) -> Tensor:
    """What stands in for a parameter, in its dtype and on its device."""
    match site.change:
        case LowRankDelta(magnitude=TensorInfo() as magnitude) as delta:
            a, b = (_finite(load(factor), site) for factor in (delta.a, delta.b))
            weight = own.cpu().float()
            tuned = (weight.T if delta.transposed else weight) + delta_rows(b, a, scale=delta.scale)
            value = renormalize(tuned, _finite(load(magnitude), site))
            value = value.T if delta.transposed else value
        case WholeValue(values):
            value = _finite(load(values), site)
        case VectorDelta(values, scale):
            value = own.cpu().float() + scale * _finite(load(values), site)
        case RowValues(values, rows):
            value = own.cpu().float().clone()
            value[list(rows)] = _finite(load(values), site)
        case _:
            raise AssertionError("is refused by the plan")
    return value.to(own.dtype).to(own.device).contiguous()


def _finite(values: Tensor, site: Site) -> Tensor:
    if not values.isfinite().all():
        raise NonFiniteError(
            f"'{site.name}': the patch contains an infinity or NaN. The training run may have diverged."
        )
    return values if values.dtype == torch.float64 else values.float()
