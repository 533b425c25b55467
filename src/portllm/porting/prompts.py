"""The prompts of an aligned port as token ids: in which of the three parts each is, and where answers are said."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from blake3 import blake3
from jaxtyping import Float32, Int64
from torch import Tensor

from portllm.methods.contract import Part

Ids = tuple[int, ...]


DEALT: tuple[Part, ...] = ("fit", "choose", "fit", "report")


def split(prompts: Sequence[str]) -> list[Part]:
    """Half of the prompts to fit on, a quarter to choose by, a quarter to report on; by their texts alone.

    Equal prompts are in the same part, whatever their order in a file.

    Example:
        >>> split(["a", "b", "c", "d"])]
        ['REPORT', 'FIT', 'CHOOSE', 'FIT']
    """
    lots = {prompt: blake3(prompt.encode()).digest() for prompt in prompts}
    order = sorted(lots, key=lots.__getitem__)
    parts = {prompt: DEALT[place % len(DEALT)] for place, prompt in enumerate(order)}
    return [parts[prompt] for prompt in prompts]


@dataclass(frozen=True)
class Rows:
    """Prompts with their answers, one after another.

    Attributes:
        ids: Of each row: prompt and answer, but for the answer's last token, which nothing follows.
        n_places: How many of its last tokens have a token of the answer after them.
        n_asked: At how many of these the models are compared: the last ones, where answers begin to differ.
        parts: What each row is for.
    """

    ids: tuple[Ids, ...]
    n_places: tuple[int, ...]
    n_asked: tuple[int, ...]
    parts: tuple[Part, ...]

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

    def of(self, *parts: Part) -> list[int]:
        """The rows of some parts."""
        return [row for row, part in enumerate(self.parts) if part in parts]

    def tokens(self, rows: Sequence[int]) -> Int64[Tensor, " tokens"]:
        """Where the tokens of some rows are among all."""
        return torch.cat([torch.arange(self.starts[row], self.starts[row + 1]) for row in rows])

    @cached_property
    def places(self) -> Int64[Tensor, " places"]:
        """Where answers are said, among all tokens."""
        return torch.cat(
            [
                torch.arange(self.starts[row + 1] - count, self.starts[row + 1])
                for row, count in enumerate(self.n_places)
            ]
        )

    @cached_property
    def row_of_place(self) -> Int64[Tensor, " places"]:
        """The row of each place."""
        return torch.repeat_interleave(torch.arange(len(self.ids)), torch.tensor(self.n_places))

    @cached_property
    def is_asked(self) -> Tensor:
        """Of each place, whether models are compared there."""
        return torch.cat(
            [torch.arange(count) >= count - asked for count, asked in zip(self.n_places, self.n_asked, strict=True)]
        )

    def weights(self, rows: Sequence[int], omega: float) -> Float32[Tensor, " tokens"]:
        """What each token of some rows counts: 1 where an answer is said, 0 at the first, `omega` at all others.

        The first token's state is many times larger than all others, whatever the text (an attention sink).
        """
        found = []
        for row in rows:
            weight = torch.full((len(self.ids[row]),), omega)
            weight[0] = 0.0
            weight[len(weight) - self.n_places[row] :] = 1.0
            found.append(weight)
        return torch.cat(found)
