"""Rows of a vocabulary follow their tokens: which row of the evolved model stands for which of the base's.

From tokenizers and headers alone. An embedding's row, a head's row and the column of a low-rank delta that belong to a
token go where the evolved tokenizer has that token; what belongs to a token that is gone is left out and named.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.vocabulary import has_same_tokenizer, read_vocabulary
from portllm.errors import Refusal
from portllm.matching.changes import changes_of
from portllm.patch.adapter_config import AdapterConfig
from portllm.patch.adapter_tensors import BIAS, WEIGHT
from portllm.patch.delta import Factor, RowValues, WholeValue
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo

F = TypeVar("F", bound=Factor)


@dataclass(frozen=True, slots=True)
class TokenMap:
    """How two vocabularies go together.

    Attributes:
        rows: For each row of the evolved vocabulary, the base's row of the same token; -1 where the base has none.
        gone: By row of the base, each token that the evolved model does not have.
    """

    rows: tuple[int, ...]
    gone: Mapping[int, str]

    @property
    def places(self) -> dict[int, int]:
        """The evolved row by the base's."""
        return {old: new for new, old in enumerate(self.rows) if old >= 0}

    @property
    def keeps_rows(self) -> bool:
        """Whether each token of the base has the row that it had."""
        return not self.gone and all(old in (-1, new) for new, old in enumerate(self.rows))

    @property
    def n_moved(self) -> int:
        """Tokens that have another row than in the base."""
        return sum(old not in (-1, new) for new, old in enumerate(self.rows))


def match_tokens(base: Checkpoint, evolved: Checkpoint) -> TokenMap | None:
    """How the rows of two models go together; None where they are the same, or a model does not say.

    A row that stands for no token in either model, as padding does, keeps its place.
    """
    before, after = base.embedding, evolved.embedding
    if before is not None and after is not None and before.shape == after.shape and has_same_tokenizer(base, evolved):
        return None
    old, new = read_vocabulary(base), read_vocabulary(evolved)
    if before is None or after is None or old is None or new is None:
        return None
    return map_tokens(old, new, n_base=before.shape[0], n_evolved=after.shape[0])


def token_map(old: Mapping[str, int], new: Mapping[str, int], *, n_base: int, n_evolved: int) -> TokenMap:
    """How the rows of two vocabularies go together."""
    rows = [-1] * n_evolved
    for token, row in new.items():
        if row < n_evolved and old.get(token, n_base) < n_base:
            rows[row] = old[token]
    for row in set(range(min(n_base, n_evolved))) - set(old.values()) - set(new.values()):
        rows[row] = row
    names = {row: token for token, row in old.items()}
    kept = set(rows)
    return TokenMap(tuple(rows), {row: names.get(row, f"row {row}") for row in range(n_base) if row not in kept})


def map_tokens(old: Mapping[str, int], new: Mapping[str, int], *, n_base: int, n_evolved: int) -> TokenMap | None:
    """How the rows of two vocabularies go together; None where each token has the same row in both.

    Example:
        >>> map_tokens({"a": 0, "b": 1, "c": 2}, {"c": 0, "a": 1, "d": 2}, n_base=4, n_evolved=4)
        TokenMap(rows=(2, 0, -1, 3), gone={1: 'b'})
    """
    tokens = token_map(old, new, n_base=n_base, n_evolved=n_evolved)
    return None if n_base == n_evolved and tokens.keeps_rows else tokens


def has_token_rows(name: str, checkpoint: Checkpoint) -> bool:
    """Whether the rows of a tensor stand for tokens."""
    return bool(_with_token_rows([name], checkpoint))


def token_changes(patch: Patch[TensorInfo], checkpoint: Checkpoint) -> list[str]:
    """The tensors with a row for each token that a patch changes."""
    return _with_token_rows(changes_of(patch), checkpoint)


def _with_token_rows(names: Iterable[str], checkpoint: Checkpoint) -> list[str]:
    shared = checkpoint.embedding
    return [
        name
        for name in names
        if checkpoint.current_name(name) in (checkpoint.head_name, checkpoint.head_module + BIAS)
        or (shared is not None and checkpoint.tensor(name) is shared)
    ]


def unmovable(patch: Patch[TensorInfo], names: Sequence[str]) -> Iterator[Refusal]:
    """Changes of such tensors that cannot follow their tokens."""
    for name in names:
        delta = patch.deltas.get(name.removesuffix(WEIGHT))
        if name in patch.bias_deltas or (delta is not None and delta.magnitude is not None):
            yield Refusal(
                name.removesuffix(WEIGHT),
                "its rows belong to tokens that have other rows in the evolved model, and a DoRA magnitude or a "
                "bias of lora_B cannot be moved with them. Train the adapter without it, or leave this module "
                "out.",
            )


def following(
    patch: Patch[F], names: Sequence[str], tokens: TokenMap, take: Callable[[F, Sequence[int], int], F]
) -> Patch[F]:
    """The patch with every row, column and id of a token where the evolved model has it.

    Args:
        patch: In the base's order.
        names: What of it has a row for each token: `token_changes`.
        tokens: Which rows follow which.
        take: The factor that holds these rows of another, along an axis; -1 stands for zeros.
    """
    deltas, values, rows = dict(patch.deltas), dict(patch.values), dict(patch.rows)
    places = tokens.places
    for name in names:
        module = name.removesuffix(WEIGHT)
        if module in deltas:
            delta = deltas[module]
            deltas[module] = (
                replace(delta, a=take(delta.a, tokens.rows, 1))
                if delta.is_embedding
                else replace(delta, b=take(delta.b, tokens.rows, 0))
            )
        if name in values:
            values[name] = WholeValue(take(values[name].values, tokens.rows, 0))
        if name in rows:
            kept = [number for number, row in enumerate(rows[name].rows) if row in places]
            moved = tuple(places[rows[name].rows[number]] for number in kept)
            rows[name] = RowValues(take(rows[name].values, kept, 0), moved)
            if not kept:
                del rows[name]
    return replace(patch, deltas=deltas, values=values, rows=rows, config=moved_config(patch.config, tokens))


def resized(info: TensorInfo, rows: Sequence[int], axis: int) -> TensorInfo:
    """For `following`, where shapes are all that is asked for: the tensor as its header will say, written or not."""
    return replace(info, shape=(*info.shape[:axis], len(rows), *info.shape[axis + 1 :]))


def moved_config(config: AdapterConfig, tokens: TokenMap) -> AdapterConfig:
    """The configuration with the token ids of the evolved model.

    Example:
        >>> config = AdapterConfig({"trainable_token_indices": {"embed_tokens": [2, 1]}})
        >>> moved_config(config, TokenMap((2, 0, -1, 3), {1: "b"})).fields
        {'trainable_token_indices': {'embed_tokens': [0]}}
    """
    named = config.fields.get("trainable_token_indices")
    if not named:
        return config
    moved: object
    if isinstance(named, dict):
        lists = {name: _moved(cast(list[int], ids), tokens) for name, ids in named.items()}
        moved = {name: ids for name, ids in lists.items() if ids} or None
    else:
        moved = _moved(cast(list[int], named), tokens) or None
    return AdapterConfig({**config.fields, "trainable_token_indices": moved})


def _moved(ids: Sequence[int], tokens: TokenMap) -> list[int]:
    places = tokens.places
    return [places[row] for row in ids if row in places]
