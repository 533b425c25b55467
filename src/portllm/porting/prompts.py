"""The rows of an aligned port as token ids: what each is for, and where the tokens that count are."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from blake3 import blake3
from torch import Tensor

from portllm.arrays import Bool, Int64
from portllm.methods.contract import Kind, Part

Ids = tuple[int, ...]

DEALT: tuple[Part, ...] = ("fit", "choose", "fit", "report")


def split(texts: Sequence[str], dealt: Sequence[Part] = DEALT) -> tuple[Part, ...]:
    """Half of the texts to fit on, a quarter to choose by, a quarter to report on; by the texts alone.

    Equal texts are in the same part, whatever their order in a file.

    Example:
        >>> split(["a", "b", "c", "d"])
        ('choose', 'fit', 'report', 'fit')
    """
    lots = {text: blake3(text.encode()).digest() for text in texts}
    parts = {text: dealt[place % len(dealt)] for place, text in enumerate(sorted(lots, key=lots.__getitem__))}
    return tuple(parts[text] for text in texts)


@dataclass(frozen=True)
class Rows:
    """Texts, one after another.

    Attributes:
        ids: Of each row; the last token that is said stands in `next_ids` alone, since nothing follows it.
        n_places: How many of its last tokens are followed by what counts: a token of an answer.
        parts: What each row is for.
        next_ids: The token after each place, row after row.
    """

    ids: tuple[Ids, ...]
    n_places: tuple[int, ...]
    parts: tuple[Part, ...]
    next_ids: Ids

    @classmethod
    def answered(cls, prompts: Sequence[Ids], answers: Sequence[Ids], parts: tuple[Part, ...]) -> "Rows":
        """Prompts with what is said to them."""
        return cls(
            ids=tuple((*prompt, *answer[:-1]) for prompt, answer in zip(prompts, answers, strict=True)),
            n_places=tuple(map(len, answers)),
            parts=parts,
            next_ids=tuple(token for answer in answers for token in answer),
        )

    @cached_property
    def starts(self) -> list[int]:
        """Where each row begins among all tokens."""
        starts = [0]
        for row in self.ids:
            starts.append(starts[-1] + len(row))
        return starts

    @property
    def n_tokens(self) -> int:
        """Of all rows."""
        return self.starts[-1]

    def of(self, parts: Collection[Part]) -> list[int]:
        """The rows of some parts."""
        return [row for row, part in enumerate(self.parts) if part in parts]

    def tokens(self, rows: Sequence[int]) -> Int64[Tensor, " tokens"]:
        """Where the tokens of some rows are among all."""
        return torch.cat([torch.arange(self.starts[row], self.starts[row + 1]) for row in rows])

    @cached_property
    def places(self) -> Int64[Tensor, " places"]:
        """Where what counts is said, among all tokens."""
        ends = zip(self.starts[1:], self.n_places, strict=True)
        return torch.cat([torch.arange(end - count, end) for end, count in ends])

    @cached_property
    def row_of_place(self) -> Int64[Tensor, " places"]:
        """The row of each place."""
        return torch.repeat_interleave(torch.arange(len(self.ids)), torch.tensor(self.n_places))

    def is_of(self, part: Part) -> Bool[Tensor, " places"]:
        """Of each place, whether its row is of a part."""
        return torch.tensor([each == part for each in self.parts])[self.row_of_place]

    def by_row(self, values: Tensor, there: Bool[Tensor, " places"]) -> Tensor:
        """The mean of values at some places, whole rows of them, over the places of each row, in float64."""
        rows, counts = torch.unique_consecutive(self.row_of_place[there], return_inverse=True, return_counts=True)[1:]
        means: Tensor = torch.zeros(len(counts), dtype=torch.float64).index_add(0, rows, values.double()) / counts
        return means

    def kinds(self, rows: Sequence[int]) -> Int64[Tensor, " tokens"]:
        """What each token of some rows is; see `portllm.methods.contract.Kind`."""
        found = []
        for row in rows:
            kinds = torch.full((len(self.ids[row]),), Kind.PROMPT)
            said = Kind.ANSWER if self.parts[row] in DEALT else Kind.GENERAL
            kinds[len(kinds) - self.n_places[row] :] = said
            kinds[0] = Kind.FIRST
            found.append(kinds)
        return torch.cat(found)
