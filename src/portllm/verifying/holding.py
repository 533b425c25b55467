"""Does a checkpoint that any tool has merged hold a patch? Each tensor is merged again and compared, block by block."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.errors import PlanRefusedError, Refusal, refuse
from portllm.merging.options import MergeOptions
from portllm.merging.plan import MergePlan, MergeStep, plan_merge
from portllm.merging.tensor import Target, TensorOptions, TensorResults, make_tensor, workspaces
from portllm.patch.patch import Patch
from portllm.progress import Progress, silent
from portllm.tensors.bytes import read_bytes
from portllm.tensors.encoding import GGMLBlocks, is_plain
from portllm.tensors.info import FLOAT_DTYPES, TensorInfo, n_bytes_of
from portllm.tensors.numbers import decode_floats
from portllm.tensors.windows import load_values
from portllm.verifying.likeness import Extent, Likeness


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """What was found of one tensor.

    Attributes:
        extent: Whether it is base + patch, for one that the patch changes; whether it is the base's for another one.
        is_changed: Whether the patch changes it.
        finding: What it is instead; empty where it holds.
    """

    extent: Extent
    is_changed: bool
    finding: str = ""


@dataclass(frozen=True, slots=True)
class Holding:
    """How far a merged model holds a patch.

    Attributes:
        tensors: What was found, by the tensor's name in the base.
    """

    tensors: Mapping[str, HeldTensor]

    def __repr__(self) -> str:
        return f"Holding({self.extent.value!r}, wrong={list(self.wrong)[:3]})"

    @property
    def wrong(self) -> Mapping[str, HeldTensor]:
        """The tensors that are not what they should be."""
        return {name: held for name, held in self.tensors.items() if held.extent is Extent.NOT}

    @property
    def extent(self) -> Extent:
        """Of the whole model."""
        changed = [held for held in self.tensors.values() if held.is_changed]
        if not self.wrong:
            exact = all(held.extent is Extent.EXACTLY for held in self.tensors.values())
            return Extent.EXACTLY if exact else Extent.TO_ROUNDING
        holds_some = any(held.extent is not Extent.NOT for held in changed)
        return Extent.PARTLY if holds_some else Extent.NOT


def find_holding(
    patch: Patch[TensorInfo], *, base: Checkpoint, merged: Checkpoint, progress: Progress = silent
) -> Holding:
    """Merge again, and compare with what there is.

    Raises:
        PlanRefusedError: It cannot be said: the patch does not fit the base, the two models have other tensors, or the
            weights are quantized so coarsely that the patch is lost in it.
        CheckpointError: A file cannot be read.
    """
    pairs = _pairs(patch, base, merged)
    tensors: dict[str, HeldTensor] = {}
    hidden: list[Refusal] = []
    total = sum(info.n_bytes for _, info in pairs.values())
    done = 0
    with workspaces(TensorOptions(threads=1), [step for step, _ in pairs.values()]) as free:
        bench = free.get()
        for name, (step, info) in pairs.items():
            comparison = _Comparison(step, info)
            (result,) = make_tensor([Target(step, comparison.take)], bench, lambda _: None)
            if not isinstance(result, TensorResults):
                raise result
            tensors[name] = comparison.held
            hidden += [] if comparison.hidden is None else [comparison.hidden]
            done += info.n_bytes
            progress("compare", done, total, "bytes")
    refuse(hidden)
    return Holding(tensors)


class _Comparison:
    """One tensor of the merged model, held against what a merge makes of it."""

    def __init__(self, step: MergeStep, info: TensorInfo) -> None:
        self._step, self._info = step, info
        self._is_float = step.entry.dtype in FLOAT_DTYPES
        self._is_same = True
        self._likeness = Likeness(step.entry.dtype, step.source.dtype)

    def take(self, place: int, made: memoryview) -> None:
        """The next bytes that a merge makes."""
        dtype = self._step.entry.dtype
        is_copy = self._step.change is None and self._info.encoding is None and self._info.dtype == dtype
        if is_copy and read_bytes(self._info, place, place + len(made)) == made:
            return
        if not self._is_float:
            self._is_same = False
            return
        width = n_bytes_of(dtype, (1,))
        start, stop = place // width, (place + len(made)) // width
        merged, base = load_values(self._info, start, stop), _base_values(self._step, start, stop)
        encoding = self._info.encoding
        if isinstance(encoding, GGMLBlocks) and not is_plain(encoding):
            bits = 8 * encoding.n_bytes // encoding.elements
            self._likeness.add_quantized(merged, decode_floats(made, dtype), base, bits=bits)
        else:
            self._likeness.add(merged, decode_floats(made, dtype), base)

    @property
    def hidden(self) -> Refusal | None:
        """Why it cannot be said of this tensor; None where it can."""
        if not self._likeness.is_hidden or self._info.encoding is None:
            return None
        why = "is so coarse that the patch cannot be told from chance. Pass the 16-bit file that it was made from."
        return Refusal(self._step.entry.name, f"{self._info.encoding.scheme} {why}")

    @property
    def held(self) -> HeldTensor:
        """What was found."""
        is_changed = self._step.change is not None
        extent = self._likeness.extent if self._is_same else Extent.NOT
        if extent is not Extent.NOT:
            return HeldTensor(extent, is_changed)
        if is_changed:
            return HeldTensor(extent, is_changed, self._likeness.finding)
        return HeldTensor(extent, is_changed, "differs from the base, and the patch leaves it alone")


def _base_values(step: MergeStep, start: int, stop: int) -> np.ndarray:
    """The base's own values of some elements; zeros for rows that it does not have."""
    there = load_values(step.source, min(start, step.source.n_params), min(stop, step.source.n_params))
    return np.concatenate([there, np.zeros(stop - start - len(there), np.float32)])


def _pairs(patch: Patch[TensorInfo], base: Checkpoint, merged: Checkpoint) -> dict[str, tuple[MergeStep, TensorInfo]]:
    """By name, what a merge would make of each tensor, in the dtypes of a merged model, and that model's own."""
    if any(info.encoding is not None and not isinstance(info.encoding, GGMLBlocks) for info in merged.infos.values()):
        why = f"is quantized ({merged.quantization}). Pass the 16-bit model that it was made from."
        raise PlanRefusedError([Refusal(merged.name, why)])
    plan = plan_merge(patch, into=base, options=MergeOptions(dtype="F32" if base.quantization is not None else None))
    refuse(plan.refusals)
    found: dict[str, tuple[MergeStep, TensorInfo]] = {}
    refusals = []
    for name, step in _steps(plan, merged).items():
        info = merged.tensor(name)
        if info is None:
            if base.family is None or base.family.loads(base.current_name(name), base.config):
                refusals.append(Refusal(name, f"{merged.name} has no such tensor; they cannot be compared."))
        elif info.shape != step.entry.shape:
            refusals.append(
                Refusal(name, f"has shape {info.shape} in {merged.name}; base and patch give {step.entry.shape}.")
            )
        elif info.dtype not in FLOAT_DTYPES and info.dtype != step.entry.dtype:
            refusals.append(Refusal(name, f"is stored as {info.dtype} in {merged.name}; use the unquantized model."))
        else:
            stored_as = info.dtype if step.entry.dtype in FLOAT_DTYPES else step.entry.dtype
            found[name] = replace(step, entry=replace(step.entry, dtype=stored_as)), info
    used = {info.name for _, info in found.values()}
    twice = {merged.head.name} if merged.head is not None and merged.tied_embedding is not None else set()
    refusals += [
        Refusal(name, f"{merged.name} has it, but not {base.name}; they cannot be compared.")
        for name in sorted(set(merged.infos) - used - twice)
    ]
    refuse(refusals)
    return found


def _steps(plan: MergePlan, merged: Checkpoint) -> dict[str, MergeStep]:
    """The steps of a merge, and one for a head that the merged model has of its own though it is tied in the base."""
    steps = dict(plan.steps)
    shared = plan.into.tied_embedding
    if merged.head is not None and plan.into.head is None and shared is not None and shared.name in steps:
        step = steps[shared.name]
        steps.setdefault(plan.into.head_name, replace(step, entry=replace(step.entry, name=plan.into.head_name)))
    return steps


def holding_to_json(holding: Holding) -> dict[str, object]:
    """The answer, and what was found of each tensor, as JSON values."""
    return {
        "extent": holding.extent.value,
        "tensors": {
            name: {"extent": held.extent.value, "changed": held.is_changed, "finding": held.finding}
            for name, held in holding.tensors.items()
        },
    }
