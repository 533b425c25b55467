"""Which tensor of the evolved model is which of the base's: every tensor of both is accounted for. Headers only."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.experts import Experts
from portllm.measures.places import TensorPlace, place_of
from portllm.tensors.info import FLOAT_DTYPES, TensorInfo


@dataclass(frozen=True)
class TensorPair:
    """The same weight in base and evolved.

    Attributes:
        name: Its current name; that of an expert's own matrix where one of the models stores experts apart.
        base: The base's tensor, or the rows of it that belong to this weight.
        evolved: The evolved model's.
        first_row: Of the evolved model's stored tensor, the row at which `evolved` begins.
    """

    name: str
    base: TensorInfo
    evolved: TensorInfo
    first_row: int = 0

    @cached_property
    def place(self) -> TensorPlace:
        """Where in the model it stands."""
        return place_of(self.name)

    @property
    def rows(self) -> int:
        """Rows of the weight as a matrix: all axes but the last; a vector is one row."""
        return self.base.n_params // self.width if self.width else 0

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.base.shape[-1] if self.base.shape else 1


@dataclass(frozen=True, slots=True)
class Pairing:
    """All tensors of two models.

    Attributes:
        pairs: What both have, by name.
        added: What the evolved model alone has.
        removed: What the base alone has.
        reshaped: What both have in another shape, and why that cannot be compared.
        grown: What has more or fewer rows in the evolved model; the rows that both have are a pair.
        no_numbers: What one of them stores as something else than floating-point numbers.
    """

    pairs: Mapping[str, TensorPair]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    grown: Mapping[str, tuple[int, int]]
    no_numbers: tuple[str, ...]


def pair_tensors(base: Checkpoint, evolved: Checkpoint) -> Pairing:
    """Match two models tensor by tensor, however either spells its names or keeps its experts.

    Of an embedding or a head whose number of rows has changed, the first rows are compared, as many as both have.
    """
    before, after = dict(base.own_tensors), dict(evolved.own_tensors)
    pairs = _expert_pairs(base, evolved, before, after)
    by_token = {base.head_name, *(name for name, info in before.items() if info is base.embedding)}
    reshaped, grown, no_numbers = {}, {}, []
    for name in sorted(before.keys() & after.keys()):
        old, new = before[name], after[name]
        if not {old.dtype, new.dtype} <= set(FLOAT_DTYPES):
            no_numbers.append(name)
        elif old.shape == new.shape:
            pairs[name] = TensorPair(name, old, new)
        elif name in by_token and old.shape[1:] == new.shape[1:] and is_unencoded(old) and is_unencoded(new):
            grown[name] = (old.shape[0], new.shape[0])
            height = min(old.shape[0], new.shape[0])
            pairs[name] = TensorPair(name, rows_of(old, 0, height), rows_of(new, 0, height))
        else:
            reshaped[name] = (old.shape, new.shape)
    return Pairing(
        dict(sorted(pairs.items())),
        added=tuple(sorted(after.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - after.keys())),
        reshaped=reshaped,
        grown=grown,
        no_numbers=tuple(no_numbers),
    )


def is_unencoded(info: TensorInfo) -> bool:
    """Whether the bytes of a tensor are its values, one after the other, so that rows of it are a tensor too."""
    return info.encoding is None and info.dtype in FLOAT_DTYPES


def rows_of(info: TensorInfo, start: int, stop: int) -> TensorInfo:
    """Some rows of a tensor as a tensor; rows are stored as the whole is."""
    size = info.n_bytes // max(1, info.shape[0])
    return replace(
        info, shape=(stop - start, *info.shape[1:]), start=info.start + start * size, stop=info.start + stop * size
    )


def _expert_pairs(
    base: Checkpoint, evolved: Checkpoint, before: dict[str, TensorInfo], after: dict[str, TensorInfo]
) -> dict[str, TensorPair]:
    """The matrices of experts that one model stores apart and the other as one; they leave `before` and `after`."""
    pairs: dict[str, TensorPair] = {}
    old, new = base.experts, evolved.experts
    for name in sorted(old.keys() & new.keys()):
        if name in before and name not in after:
            found = _split(new[name], old[name], after)
            pairs |= {own: TensorPair(own, piece, part) for own, part, piece, _ in found}
        elif name in after and name not in before:
            found = _split(old[name], new[name], before)
            pairs |= {own: TensorPair(own, part, piece, row) for own, part, piece, row in found}
        else:
            continue
        if found:
            del (before if name in before else after)[name]
            for own, *_ in found:
                del (after if own in after else before)[own]
    return pairs


def _split(
    apart: Experts, fused: Experts, tensors: Mapping[str, TensorInfo]
) -> list[tuple[str, TensorInfo, TensorInfo, int]]:
    """For each matrix of each expert: its name, itself, its piece of the fused tensor, and the row that begins at."""
    names = {info.name: name for name, info in tensors.items()}
    found = []
    for number, (parts, (whole,)) in enumerate(zip(apart, fused, strict=False)):
        first = 0
        for part in parts:
            piece = rows_of(whole, first, first + part.shape[0])
            if piece.shape != part.shape or piece.stop > whole.stop or not is_unencoded(whole):
                return []
            found.append((names[part.name], part, piece, number * whole.shape[0] + first))
            first += part.shape[0]
    return found if len(apart) == len(fused) else []
