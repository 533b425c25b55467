"""Tokens that only the patch has, on their way to an evolved vocabulary: by their string, or behind its last token.

They were added to the base's vocabulary for the patch, or belong to the base's and are trained by the patch, and the
evolved model does not have them. Their rows are the patch's own: they go along as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import side_file
from portllm.checkpoint.vocabulary import TOKENIZER_FILE, added_entries, read_vocabulary
from portllm.errors import Refusal
from portllm.matching.added_tokens import height_of, matrices_of, n_rows_of, padded, vocabulary_of
from portllm.matching.token_rows import TokenMap, token_map
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo


@dataclass(frozen=True, slots=True)
class CarriedTokens:
    """Where the tokens of a patch's vocabulary are in the evolved one.

    Attributes:
        tokens: Which row of the evolved vocabulary stands for which of the patch's.
        own: The rows of the patch's vocabulary that are its own.
        added: The row of each of its own tokens in the evolved vocabulary.
        existing: Those of them that the evolved model has.
    """

    tokens: TokenMap
    own: frozenset[int]
    added: Mapping[str, int]
    existing: frozenset[str]

    @property
    def n_rows(self) -> int:
        """How many rows the evolved vocabulary has with them."""
        return len(self.tokens.rows)

    def base_rows(self) -> list[int]:
        """For each row of the evolved vocabulary the base's of the same token; -1 where there is none."""
        return [-1 if row in self.own else row for row in self.tokens.rows]

    def evolved_rows(self, n_rows: int) -> list[int]:
        """For each row of the evolved vocabulary itself, where the model has it and the patch has no own one; or -1."""
        return [-1 if row in self.own or new >= n_rows else new for new, row in enumerate(self.tokens.rows)]

    def own_rows(self) -> list[int]:
        """For each row of the evolved vocabulary that of the patch's, where that is its own; or -1."""
        return [row if row in self.own else -1 for row in self.tokens.rows]


def carry_tokens(
    patch: Patch[TensorInfo], base: Checkpoint, evolved: Checkpoint, added: Mapping[str, int]
) -> CarriedTokens | Refusal:
    """Give the tokens that only a patch has their rows in an evolved vocabulary.

    Args:
        patch: Held against the base.
        base: The model that it belongs to.
        evolved: Where it goes.
        added: Its own tokens, with their rows in its vocabulary.
    """
    n_rows, height = n_rows_of(base), height_of(patch, base)
    known = vocabulary_of(patch) or read_vocabulary(base)
    new = read_vocabulary(evolved)
    if (known is None or new is None) and n_rows != n_rows_of(evolved):
        return Refusal(
            "--evolved",
            f"the patch has rows of its own for {', '.join(map(repr, list(added)[:4]))}. Base and evolved model have "
            f"{n_rows} and {n_rows_of(evolved)} rows, and one has no {TOKENIZER_FILE} that says which are the same.",
            is_of_input=True,
        )
    old = {**(known if known is not None else new or {}), **added}
    if new is None:
        new = {token: row for token, row in old.items() if token not in added}
        first = max(height_of_tokens(new), min(added.values(), default=0))
    else:
        first = height_of_tokens(new)
    missing = [token for token in added if token not in new]
    rows = {token: new[token] for token in added if token in new}
    rows |= {token: first + number for number, token in enumerate(missing)}
    n_evolved = max(n_rows_of(evolved), height_of_tokens(rows))
    if n_rows == n_rows_of(evolved):
        n_evolved = max(n_evolved, height)  # padded as the base was
    elif n_evolved > n_rows_of(evolved):
        n_evolved = padded(n_evolved, like=height, last=max(old.values()))
    tokens = token_map(old, {**new, **rows}, n_base=height, n_evolved=n_evolved)
    own = frozenset({*range(n_rows, height), *added.values()})
    named = set(old.values())
    tokens = replace(tokens, gone={row: token for row, token in tokens.gone.items() if row < n_rows or row in named})
    return CarriedTokens(
        tokens, own, dict(sorted(rows.items(), key=lambda pair: pair[1])), frozenset(added) - {*missing}
    )


def height_of_tokens(vocabulary: Mapping[str, int]) -> int:
    """The row behind the last token."""
    return 1 + max(vocabulary.values(), default=-1)


def orphaned(
    patch: Patch[TensorInfo], base: Checkpoint, tokens: TokenMap | None, by_token: Sequence[str]
) -> dict[str, int]:
    """Added tokens of the base that a patch changes and an evolved model does not have, with their rows.

    A token of the tokenizer's own kind cannot be added to another one: text would be split otherwise.
    """
    file = side_file(base, TOKENIZER_FILE)
    if tokens is None or not tokens.gone or file is None:
        return {}
    entries = added_entries(file)
    are_all_changed = any(name not in patch.rows for name in by_token)
    trained = {row for rows in patch.rows.values() for row in rows.rows}
    return {
        token: row for row, token in tokens.gone.items() if token in entries and (are_all_changed or row in trained)
    }


def with_rows_of(base: Checkpoint, patch: Patch[TensorInfo]) -> Patch[TensorInfo]:
    """The patch with embedding and head of a base that has the rows of its own tokens, wherever it has none itself."""
    there = [base.tensor(name) for name in (*patch.resized, *patch.values)]
    more = {
        name: base.tensors[name]
        for name in matrices_of(base)
        if not any(base.tensors[name] is tensor for tensor in there)
    }
    return replace(patch, resized={**patch.resized, **more})
