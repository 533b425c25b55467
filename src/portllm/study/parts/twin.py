"""A model that computes the same function with weights that have nothing in common with the first's. Pure.

The control of every measure that reads weights: a patch of the one is worthless on the other, whatever their outputs
say. The units of a decoder can be put in another order, and those of the residual stream can change their signs, as
long as every matrix that reads or writes them follows (permutation symmetries: Ainsworth et al., 2023, arXiv
2209.04836). Only orders and signs change, so nothing is rounded but sums whose terms come in another order.

A rotation of the residual stream would do the same only up to rounding, and would have to fold the weights of its norms
into the matrices behind them, which takes a tied head apart; an order with signs keeps both as they are.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from portllm.errors import CheckpointError

RESIDUAL, UNITS, QUERIES, KEYS, VALUES, HEADS = "residual", "units", "queries", "keys", "values", "heads"

MATRICES: Mapping[str, tuple[str | None, str | None]] = {
    "embed_tokens": (None, RESIDUAL),
    "lm_head": (None, RESIDUAL),
    "q_proj": (QUERIES, RESIDUAL),
    "k_proj": (KEYS, RESIDUAL),
    "v_proj": (VALUES, RESIDUAL),
    "o_proj": (RESIDUAL, HEADS),
    "gate_proj": (UNITS, RESIDUAL),
    "up_proj": (UNITS, RESIDUAL),
    "down_proj": (RESIDUAL, UNITS),
}
"""What the rows and the columns of a module's weight stand for; of an embedding's rows nothing is to be changed."""

NORMS = (
    "norm",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
"""Norms of the residual stream: their weights follow its order and, as factors, have no use for its signs."""

NORMS_OF_HEADS = ("q_norm", "k_norm")
"""Norms within each head, whose order inside stays."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A new order of units, and the sign of each: `x'[i] = signs[i] · x[order[i]]`."""

    order: Tensor
    signs: Tensor


@dataclass(frozen=True)
class Twin:
    """The change of a decoder's tensors, one by one.

    The residual stream takes an order and signs; the units of each MLP an order; key heads an order, the query heads of
    each an order among themselves, and the dimensions of each head's values an order and signs. Inside of queries and
    keys nothing moves, so that positions may enter as they like.

    Attributes:
        hidden: Size of the residual stream.
        inner: Units of an MLP.
        heads: Query heads.
        key_heads: Heads of keys and values.
        head_dim: Size of a head.
        seed: Of orders and signs.

    Example:
        >>> twin = Twin(hidden=4, inner=6, heads=2, key_heads=1, head_dim=2, seed=0)
        >>> twin.changed("model.layers.0.mlp.down_proj.weight", torch.ones(4, 6)).abs().sum()
        tensor(24.)
    """

    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_dim: int
    seed: int

    def changed(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the twin.

        Args:
            name: The tensor's current name; see `portllm.checkpoint.model.families`.
            tensor: As it is in the model.

        Raises:
            CheckpointError: It is a tensor of which it is not known what its axes stand for.
        """
        *above, module, part = name.split(".")
        layer = ".".join(above[:-1])
        if module in NORMS and part == "weight":
            return tensor[self.residual.order]
        if module in NORMS_OF_HEADS and part == "weight":
            return tensor
        if module not in MATRICES or part not in ("weight", "bias"):
            raise CheckpointError(
                f"'{name}': its axes are unknown, so no twin can be made of it. Expected a dense decoder with "
                f"modules {', '.join(MATRICES)}."
            )
        rows, columns = MATRICES[module]
        tensor = _arranged(tensor, self._arrangement(rows, layer), axis=0)
        return tensor if part == "bias" else _arranged(tensor, self._arrangement(columns, layer), axis=1)

    @cached_property
    def residual(self) -> Arrangement:
        """Of the residual stream, the same in all layers."""
        draw = random.Random(f"{self.seed}/{RESIDUAL}")
        return _with_signs(_shuffled(self.hidden, draw), draw)

    def _arrangement(self, space: str | None, layer: str) -> Arrangement | None:
        if space is None:
            return None
        if space == RESIDUAL:
            return self.residual
        draw = random.Random(f"{self.seed}/{layer}/{UNITS if space == UNITS else HEADS}")
        if space == UNITS:
            return _unsigned(_shuffled(self.inner, draw))
        # All four of attention follow from the same draws, in the same order.
        group = self.heads // self.key_heads
        key_order = _shuffled(self.key_heads, draw)
        query_order = [[key * group + head for head in _shuffled(group, draw)] for key in key_order]
        dims = [_with_signs(_shuffled(self.head_dim, draw), draw) for _ in key_order]
        as_they_are = _unsigned(list(range(self.head_dim)))
        queries = [head for heads in query_order for head in heads]
        match space:
            case "queries":
                return self._by_head(queries, lambda _: as_they_are)
            case "keys":
                return self._by_head(key_order, lambda _: as_they_are)
            case "values":
                return self._by_head(key_order, lambda place: dims[place])
            case _:
                return self._by_head(queries, lambda place: dims[place // group])

    def _by_head(self, order: list[int], inside: Callable[[int], Arrangement]) -> Arrangement:
        """Heads in an order, the dimensions of each in one of its own, which goes by its new place."""
        parts = [inside(place) for place in range(len(order))]
        return Arrangement(
            torch.cat([head * self.head_dim + part.order for head, part in zip(order, parts, strict=True)]),
            torch.cat([part.signs for part in parts]),
        )


def _arranged(tensor: Tensor, arrangement: Arrangement | None, *, axis: int) -> Tensor:
    if arrangement is None:
        return tensor
    signs = arrangement.signs.to(tensor.dtype)
    return tensor.index_select(axis, arrangement.order) * (signs[:, None] if axis == 0 < tensor.ndim - 1 else signs)


def _shuffled(size: int, draw: random.Random) -> list[int]:
    order = list(range(size))
    draw.shuffle(order)
    return order


def _with_signs(order: list[int], draw: random.Random) -> Arrangement:
    return Arrangement(torch.tensor(order), torch.tensor([draw.choice((-1, 1)) for _ in order]))


def _unsigned(order: list[int]) -> Arrangement:
    return Arrangement(torch.tensor(order), torch.ones(len(order), dtype=torch.int64))
