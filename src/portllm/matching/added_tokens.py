"""Tokens that were added to a vocabulary for a patch: which they are, and how many rows a model has with them.

A trainer adds tokens to a tokenizer, resizes the model, and saves both with the adapter, or the tokenizer alone. Which
row is whose, the tokenizer says; what else a resized model has behind its last row pads it to a multiple of eight.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar, cast

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.vocabulary import MAX_ROWS, read_vocabulary, vocabulary_in
from portllm.errors import Refusal
from portllm.patch.adapter_config import AdapterConfig
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.delta import Factor, RowValues
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo

F = TypeVar("F", bound=Factor)

PAD_MULTIPLE = 128
"""The largest number that vocabularies are padded to multiples of."""

SHOWN = 4


def vocabulary_of(patch: Patch[TensorInfo]) -> Mapping[str, int] | None:
    """The rows of all tokens of the tokenizer saved with a patch; None where there is none.

    Raises:
        CheckpointError: It is damaged.
    """
    return vocabulary_in({name: file.path for name, file in patch.beside.items()}) if patch.beside else None


def added_tokens(patch: Patch[TensorInfo], base: Checkpoint) -> dict[str, int]:
    """The tokens that were added to the vocabulary of a base for a patch, with their rows, in the order of these.

    Raises:
        CheckpointError: A tokenizer is damaged.
    """
    told = {} if patch.record is None else patch.record.added_tokens
    mine = vocabulary_of(patch) if not told else None
    if mine:
        theirs = read_vocabulary(base)
        n_rows = n_rows_of(base) or MAX_ROWS
        told = {token: row for token, row in mine.items() if (row >= n_rows if theirs is None else token not in theirs)}
    return dict(sorted(told.items(), key=lambda pair: pair[1]))


def n_rows_of(model: Checkpoint) -> int:
    """How many rows its embedding has; none for a model whose embedding is not known."""
    return 0 if model.embedding is None else model.embedding.shape[0]


def height_of(patch: Patch[TensorInfo], model: Checkpoint) -> int:
    """How many rows embedding and head have in a model with a patch: as many as it has, or more."""
    found = [n_rows_of(model)]
    for name in _by_token(patch, model):
        module = name.removesuffix(WEIGHT)
        if name in patch.resized:
            found.append(patch.resized[name].shape[0])
        if name in patch.values:
            found.append(patch.values[name].values.shape[0])
        if name in patch.rows:
            found.append(1 + max(patch.rows[name].rows))
        if module in patch.deltas:
            found.append(patch.deltas[module].shape[0])
    return max(found)


def own_rows(patch: Patch[TensorInfo], base: Checkpoint) -> range:
    """The rows of a patch's vocabulary that its base does not have."""
    return range(n_rows_of(base), height_of(patch, base))


def _by_token(patch: Patch[TensorInfo], model: Checkpoint) -> list[str]:
    names = {*patch.resized, *patch.values, *patch.rows, *(module + WEIGHT for module in patch.deltas)}
    return sorted(name for name in names if model.is_by_token(model.tensor(name)))


def with_height(info: TensorInfo, n_rows: int) -> TensorInfo:
    """What a header would say of a tensor with so many rows."""
    return replace(info, shape=(n_rows, *info.shape[1:]))


def unexplained(patch: Patch[TensorInfo], base: Checkpoint, added: Mapping[str, int]) -> Iterator[Refusal]:
    """Why a patch with more rows than a base has cannot be used with it.

    Args:
        patch: Held against the base.
        base: Which has fewer rows.
        added: The tokens that were added for the patch.
    """
    n_rows, height = n_rows_of(base), height_of(patch, base)
    if height <= n_rows:
        return
    beyond = {token: row for token, row in added.items() if n_rows <= row < height}
    if not beyond:
        yield Refusal(
            _by_token(patch, base)[0],
            f"the patch was trained on a vocabulary of {height} rows, but {base.name} has {n_rows}, and no tokenizer "
            "says what the others stand for. Put the tokenizer that it was trained with into its folder, or resize "
            f"the model first: resize_token_embeddings({height}), then save_pretrained.",
        )
        return
    for name in matrices_of(base):
        there = _rows_in(patch, name, base, n_rows)
        lost = [token for token, row in beyond.items() if row not in there]
        if lost:
            more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
            yield Refusal(
                name,
                f"the tokenizer saved with the patch has {', '.join(map(repr, lost[:SHOWN]))}{more}, for which the "
                f"patch has no rows of it and {base.name} neither: they were not saved. Pass the resized model that "
                "the adapter was trained on.",
            )


def matrices_of(base: Checkpoint) -> list[str]:
    """The embedding and, where it is another matrix, the head, by current name."""
    wanted = [info for info in (base.embedding, None if base.tied_embedding else base.head) if info is not None]
    return [name for name, info in base.tensors.items() if any(info is other for other in wanted)]


def _rows_in(patch: Patch[TensorInfo], name: str, base: Checkpoint, n_rows: int) -> set[int]:
    """The rows behind a base's last that a patch has values for."""
    tensor = base.tensor(name)
    found: set[int] = set()
    for other in _by_token(patch, base):
        if base.tensor(other) is tensor:
            whole = [patch.values[other].values] if other in patch.values else []
            whole += [patch.resized[other]] if other in patch.resized else []
            found |= {row for values in whole for row in range(n_rows, values.shape[0])}
            found |= set(patch.rows[other].rows) if other in patch.rows else set()
    return found


def with_own_rows(
    patch: Patch[F], own: Sequence[int], stack: Callable[[F | None, F, Sequence[int]], F], base: Checkpoint
) -> Patch[F]:
    """The patch with the rows of added tokens as rows that it trained, which PEFT loads on a resized base.

    Where factors lie on the weight of the resized base, which PEFT loads with them, that stays.

    Args:
        patch: Held against the base.
        own: The rows of the patch's vocabulary that are its own.
        stack: Rows of another tensor behind those of the first, where there is one.
        base: The model that it belongs to.
    """
    rows, config = dict(patch.rows), _by_module(patch, base)
    under_factors = {}
    for name, weight in patch.resized.items():
        module = name.removesuffix(WEIGHT)
        trained = rows.get(name)
        before = () if trained is None else trained.rows
        behind = [row for row in own if row < weight.shape[0] and row not in before]
        if module in patch.deltas:
            under_factors[name] = weight
        elif behind:
            stacked = stack(None if trained is None else trained.values, weight, behind)
            rows[name] = RowValues(stacked, (*before, *behind))
            config = _naming_rows(config, module, before, rows[name].rows, base)
    return replace(patch, rows=dict(sorted(rows.items())), config=config, resized=under_factors)


def _by_module(patch: Patch[F], base: Checkpoint) -> AdapterConfig:
    """The configuration with trained rows by module; where they have no name, they are the embedding's."""
    named = patch.config.fields.get("trainable_token_indices")
    if not named or isinstance(named, dict) or not patch.resized:
        return patch.config
    embedding = next(name for name in (*patch.rows, *patch.resized) if not base.is_head(name))
    return AdapterConfig({**patch.config.fields, "trainable_token_indices": {embedding.removesuffix(WEIGHT): named}})


def _naming_rows(
    config: AdapterConfig, module: str, before: Sequence[int], ids: Sequence[int], base: Checkpoint
) -> AdapterConfig:
    """The configuration with these trained rows of a module; of a tied head, which has the same, they are named too."""
    named = cast(dict[str, list[int]], config.fields.get("trainable_token_indices") or {})
    key = next((key for key in named if module == key or module.endswith(f".{key}")), module)
    twins = [
        other
        for other, old in named.items()
        if before and f".{base.head_module}".endswith(f".{other}") and [*old] == [*before]
    ]
    changed = {name: list(ids) for name in (key, *twins)}
    return AdapterConfig({**config.fields, "trainable_token_indices": {**named, **changed}})


def unplaced(patch: Patch[TensorInfo]) -> Iterator[Refusal]:
    """Why a patch with rows of its own cannot be written as an adapter; a merge has a place for all of it."""
    for name in patch.resized:
        if not name.endswith(WEIGHT):
            yield Refusal(
                name,
                "tokens were added for the adapter, and the head has a bias, for whose new rows PEFT has no place "
                "beside trained rows or factors of the head, or a tied one. Merge the adapter, or save the whole "
                "head (modules_to_save).",
            )


def sized(first: TensorInfo | None, weight: TensorInfo, rows: Sequence[int]) -> TensorInfo:
    """For `with_own_rows`, where shapes are all that is asked for."""
    return with_height(weight, len(rows) + (0 if first is None else first.shape[0]))


def padded(n_rows: int, like: int, last: int) -> int:
    """How many rows a vocabulary gets that needs `n_rows`, where another one has `like` rows for tokens up to `last`.

    Example:
        >>> padded(70, like=128, last=100), padded(70, like=66, last=65), padded(70, like=72, last=65)
        (128, 70, 72)
    """
    if last + 1 >= like:
        return n_rows
    multiple = math.gcd(like, PAD_MULTIPLE)
    return -(-n_rows // multiple) * multiple
