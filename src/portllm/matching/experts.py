"""Where a model keeps the experts of a layer: all in one tensor, or each in matrices of its own. Headers only."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.families import Family, family_of, resolve
from portllm.checkpoint.tensor.info import FLOAT_DTYPES, TensorInfo
from portllm.errors import Refusal
from portllm.patch.delta import Change, ExpertDelta, ExpertsDelta
from portllm.patch.patch import Patch


def expert_changes(name: str, delta: ExpertsDelta[TensorInfo], checkpoint: Checkpoint) -> dict[str, Change[TensorInfo]]:
    """What the deltas of all experts do, by the names of the model's tensors."""
    whole = resolve(name, checkpoint)
    if whole is not None:
        return {whole.name: delta}
    changes: dict[str, Change[TensorInfo]] = {}
    for number, matrices in enumerate(_matrices(name, checkpoint)):
        start = 0
        for info in matrices:
            changes[info.name] = ExpertDelta(delta, number, start, start + info.shape[0])
            start += info.shape[0]
    return changes


def expert_misfits(patch: Patch[TensorInfo], checkpoint: Checkpoint) -> Iterator[Refusal]:
    """Why the deltas of experts cannot be added to a model's weights, and which of them are missing."""
    family = family_of(checkpoint.config)
    for name, delta in patch.experts.items():
        if family is None or name.rpartition(".")[2] not in family.experts:
            yield Refusal(
                name,
                f"the patch changes all experts of a layer at once, and how {checkpoint.name} lays them out is not "
                "known: it is of no family with such experts. See docs/families.md.",
            )
        elif problem := _problem(name, delta, checkpoint):
            yield Refusal(name, problem)
    there = {_current(name, family) for name in patch.experts}
    for name in sorted(_parameters_in(checkpoint, family) - there):
        module, _, parameter = name.rpartition(".")
        if parameter in patch.config.parameters_of(module):
            yield Refusal(
                name,
                f"adapter_config.json names it and {checkpoint.name} has it, the patch has no tensors for it. "
                "Part of the adapter is missing, or it was made for another model.",
            )


def expert_matrices(checkpoint: Checkpoint) -> dict[str, list[list[TensorInfo]]]:
    """The matrices of each expert, by the name that the tensor of all experts has or would have.

    Stacked on each other, the matrices of one expert are its part of that tensor, whichever way a file stores it.
    """
    family = family_of(checkpoint.config)
    if family is None:
        return {}
    found: dict[str, list[list[TensorInfo]]] = {}
    for name in sorted(_parameters_in(checkpoint, family)):
        if name.rpartition(".")[2] in family.experts:
            whole = resolve(name, checkpoint)
            found[name] = list(_matrices(name, checkpoint)) if whole is None else [[part] for part in _slices(whole)]
    return {name: matrices for name, matrices in found.items() if matrices}


def _slices(info: TensorInfo) -> Iterator[TensorInfo]:
    """The parts of a tensor along its first axis; a part of a tensor is stored as a tensor is."""
    size = info.n_bytes // max(1, info.shape[0])
    for number in range(info.shape[0]):
        start = info.start + number * size
        yield replace(info, shape=info.shape[1:], start=start, stop=start + size)


def _matrices(name: str, checkpoint: Checkpoint) -> Iterator[list[TensorInfo]]:
    """The matrices of one expert after the other, where each is stored alone."""
    family = family_of(checkpoint.config)
    module, _, parameter = name.rpartition(".")
    parts = family.experts.get(parameter, ()) if family is not None else ()
    for number in count():
        found = [resolve(f"{module}.{number}.{part}.weight", checkpoint) for part in parts]
        there = [info for info in found if info is not None]
        if not there or len(there) < len(found):
            return
        yield there


def _problem(name: str, delta: ExpertsDelta[TensorInfo], checkpoint: Checkpoint) -> str | None:
    """Why one delta does not fit, or None."""
    whole = resolve(name, checkpoint)
    stored = [[whole]] if whole is not None else list(_matrices(name, checkpoint))
    if not stored:
        return f"the patch changes it, {checkpoint.name} has no such tensor, neither whole nor by expert."
    for info in (info for matrices in stored for info in matrices):
        if info.dtype not in FLOAT_DTYPES:
            return (
                f"its weight in {checkpoint.name} is stored as {info.dtype}; a patch is added to "
                f"{', '.join(FLOAT_DTYPES)} only. Use the unquantized model."
            )
    if whole is not None:
        shape = whole.shape
    else:
        widths = {info.shape[1:] for matrices in stored for info in matrices}
        heights = {sum(info.shape[0] for info in matrices) for matrices in stored}
        shape = (len(stored), *sorted(heights), *(size for width in sorted(widths) for size in width))
    if shape == delta.shape:
        return None
    return (
        f"the delta is {_axes(delta.shape)}, its weight in {checkpoint.name} is {_axes(shape)}. Adding needs equal "
        "shapes."
    )


def _parameters_in(checkpoint: Checkpoint, family: Family | None) -> set[str]:
    """Every tensor of a model that is not one matrix or vector of a module, and experts as one, by current name."""
    found = set()
    for stored, info in checkpoint.infos.items():
        name = _current(stored, family)
        if family is not None and family.is_of_expert(name):
            module = name[: name.index(".experts.")] + ".experts"
            found |= {f"{module}.{parameter}" for parameter in family.experts}
        elif len(info.shape) > 2 or not name.endswith((".weight", ".bias")):
            found.add(name)
    return found


def _current(name: str, family: Family | None) -> str:
    return name if family is None else family.current_name(name)


def _axes(shape: tuple[int, ...]) -> str:
    if len(shape) != 3:
        return str(shape)
    return "(" + ", ".join(f"{name}={size}" for name, size in zip(("experts", "out", "in"), shape, strict=True)) + ")"
