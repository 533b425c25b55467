"""Where a model keeps the experts of a layer: all in one tensor, or each in matrices of its own. Headers only."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count

from portllm.checkpoint.model.families import Family
from portllm.tensors.info import TensorInfo

Experts = tuple[tuple[TensorInfo, ...], ...]
"""For each expert its matrices. Stacked, they are its part of the tensor of all experts, however a file stores it."""


def parameters_of(tensors: Mapping[str, TensorInfo], family: Family | None) -> frozenset[str]:
    """Every tensor that is not one matrix or vector of a module, and experts as one, by current name."""
    found: set[str] = set()
    for name, info in tensors.items():
        if family is not None and family.is_of_expert(name):
            module = name[: name.index(".experts.")] + ".experts"
            found |= {f"{module}.{parameter}" for parameter in family.experts}
        elif len(info.shape) > 2 or not name.endswith((".weight", ".bias")):
            found.add(name)
    return frozenset(found)


def experts_of(tensors: Mapping[str, TensorInfo], family: Family | None) -> dict[str, Experts]:
    """The matrices of each expert, by the current name that the tensor of all experts has or would have."""
    if family is None or not family.experts:
        return {}
    found: dict[str, Experts] = {}
    for name in sorted(parameters_of(tensors, family)):
        module, _, parameter = name.rpartition(".")
        if parameter in family.experts:
            apart = _apart(module, family.experts[parameter], tensors)
            found[name] = tuple((part,) for part in _slices(tensors[name])) if name in tensors else tuple(apart)
    return {name: experts for name, experts in found.items() if experts}


def _apart(module: str, parts: tuple[str, ...], tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[TensorInfo, ...]]:
    """The matrices of one expert after the other, where each is stored alone."""
    for number in count():
        names = [f"{module}.{number}.{part}.weight" for part in parts]
        if not all(name in tensors for name in names):
            return
        yield tuple(tensors[name] for name in names)


def _slices(info: TensorInfo) -> Iterator[TensorInfo]:
    """The parts of a tensor along its first axis; a part of a tensor is stored as a tensor is."""
    size = info.n_bytes // max(1, info.shape[0])
    for number in range(info.shape[0]):
        start = info.start + number * size
        yield replace(info, shape=info.shape[1:], start=start, stop=start + size)
