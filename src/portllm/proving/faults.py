"""What goes wrong with adapters in runtimes: each fault as the change of the patch that has the same effect. Pure."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.)")
ROTATED = ("q_proj", "k_proj")
"""The modules whose rows GGUF files hold in another order than checkpoints."""


@dataclass(frozen=True, slots=True)
class Part:
    """The patch's part on one module.

    Attributes:
        name: Of the module.
        rank: Of its factors.
        alpha: Its own, or the patch's.
        scale: What its product is multiplied by.
    """

    name: str
    rank: int
    alpha: float
    scale: float

    @property
    def leaf(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The number of its layer."""
        found = LAYER.search(self.name)
        return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a patch.

    Attributes:
        factors: What the scale of a module is multiplied by; 0 leaves it out.
        reordered: Modules whose output rows are reordered, each with the new order of one head's rows.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    reordered: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        name: Short.
        text: What the served patch does then; ends the sentence "The served patch behaves as if ...".
        change: The change of the patch that has the same effect.
    """

    name: str
    text: str
    change: Change


def faults(parts: Sequence[Part], *, rank: int, alpha: float, head_rows: int | None) -> Iterator[Fault]:
    """Each fault that this patch can suffer, the scale by other factors apart.

    Args:
        parts: The patch.
        rank: The configuration's own, for modules without another.
        alpha: Likewise.
        head_rows: Rows of one attention head; None where q and k are not rotated.
    """
    yield Fault("not loaded", "none of it were loaded: the base answers", scaled(parts, 0.0))
    seen = {(1.0,) * len(parts), (0.0,) * len(parts)}
    for name, text, wrong in _wrong_scales(parts, rank=rank, alpha=alpha):
        change = Change(factors={part.name: scale / part.scale for part, scale in zip(parts, wrong, strict=True)})
        key = tuple(round(factor, 6) for factor in change.factors.values())
        if key not in seen:
            seen.add(key)
            yield Fault(name, text, change)
    yield from _left_out(parts)
    if head_rows is not None:
        yield from _reordered(parts, head_rows)


def scaled(parts: Sequence[Part], factor: float) -> Change:
    """The whole patch with its scale times a factor."""
    return Change(factors={part.name: factor for part in parts})


def _wrong_scales(parts: Sequence[Part], *, rank: int, alpha: float) -> Iterator[tuple[str, str, list[float]]]:
    """What runtimes take for the scales of modules."""
    yield (
        "scale: alpha / rank",
        "its scale were alpha / rank, and rank-stabilized scaling ignored",
        [part.alpha / part.rank for part in parts],
    )
    yield "scale: alpha / sqrt(rank)", "its scale were alpha / sqrt(rank)", [p.alpha / sqrt(p.rank) for p in parts]
    yield "scale: patterns ignored", "the patterns of ranks and alphas were ignored", [alpha / rank for _ in parts]
    yield (
        "scale: alpha pattern ignored",
        "the pattern of alphas were ignored",
        [part.scale * alpha / part.alpha for part in parts],
    )
    yield "scale: left out", "its scale were left out", [1.0 for _ in parts]
    yield "scale: twice", "its scale were applied twice", [part.scale**2 for part in parts]


def _left_out(parts: Sequence[Part]) -> Iterator[Fault]:
    """Without each layer, and without each kind of module."""
    for what, kinds in (("layer {}", {part.layer for part in parts}), ("{}", {part.leaf for part in parts})):
        if len(kinds) < 2:
            continue
        for kind in sorted(kinds, key=lambda each: (isinstance(each, str), each if each is not None else -1)):
            if kind is None:
                continue
            name = what.format(kind)
            left_out = {part.name: 0.0 for part in parts if kind in (part.layer, part.leaf)}
            yield Fault(f"without {name}", f"{name} were left out", Change(factors=left_out))


def _reordered(parts: Sequence[Part], head_rows: int) -> Iterator[Fault]:
    """With rows of q and k in the order that the other kind of file has."""
    half = head_rows // 2
    halves = tuple(start + step for step in range(half) for start in (0, half))
    pairs = tuple(start + 2 * step for start in (0, 1) for step in range(half))
    there = [leaf for leaf in ROTATED if any(part.leaf == leaf for part in parts)]
    for leaves in dict.fromkeys((tuple(there), *((leaf,) for leaf in there))):
        for order, told in ((pairs, "not permuted"), (halves, "permuted once too often")):
            modules = {part.name: order for part in parts if part.leaf in leaves}
            if modules:
                which = " and ".join(leaves)
                yield Fault(
                    f"{which} {told}", f"the rows of {which} were {told} for rotary positions", Change({}, modules)
                )
