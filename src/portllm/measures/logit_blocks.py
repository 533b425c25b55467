"""Softmax, divergence and agreement over blocks of the vocabulary as they come: all logits are never in memory.

What is kept from block to block is changed in place. New tensors, however small, would lie between the large ones of a
block, whose room the C library could then not use again: memory would grow several times over.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor


class Compared:
    """Divergence and agreement of several streams from one, over blocks of the vocabulary as they come."""

    def __init__(self, n: int, streams: Collection[str], device: torch.device) -> None:
        self._old = Softmax(n, device)
        self._expected = torch.zeros(n, dtype=torch.float64, device=device)
        self._new = {name: Softmax(n, device) for name in streams}
        self._cross = {name: torch.zeros(n, dtype=torch.float64, device=device) for name in streams}

    def add(self, start: int, old: Tensor, streams: Iterable[tuple[str, Tensor]]) -> None:
        """The logits of some tokens; those of the streams one after another, so that they need not be there at once."""
        old = old.double()
        before = self._old.most.clone()
        self._old.add(start, old)
        shares, shrink = (old - self._old.most[:, None]).exp_(), (before - self._old.most).exp_()
        self._expected.mul_(shrink).add_(torch.linalg.vecdot(shares, old))
        for name, logits in streams:
            wide = logits.double()
            self._new[name].add(start, wide)
            self._cross[name].mul_(shrink).add_(torch.linalg.vecdot(shares, old - wide))

    @property
    def entropy(self) -> Tensor:
        """`-Σ p log p` of the one that the streams are compared with, place by place."""
        return (self._old.normalizer - self._expected / self._old.sum).cpu()

    def results(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each stream, place by place: its divergence, and whether the likeliest token is the same."""
        return {
            name: (
                (cross / self._old.sum - self._old.normalizer + self._new[name].normalizer).clamp(min=0).cpu(),
                (self._old.likeliest == self._new[name].likeliest).cpu(),
            )
            for name, cross in self._cross.items()
        }


class Softmax:
    """The normalizer of a softmax and its greatest entry, over blocks of logits as they come."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.most = torch.full((n,), -torch.inf, dtype=torch.float64, device=device)
        self.sum = torch.zeros(n, dtype=torch.float64, device=device)
        self.likeliest = torch.zeros(n, dtype=torch.int64, device=device)

    def add(self, start: int, logits: Tensor) -> None:
        """The logits of some tokens, from the token `start` on."""
        most, place = logits.max(dim=1)
        torch.where(most > self.most, place + start, self.likeliest, out=self.likeliest)
        greatest = torch.maximum(most, self.most)
        shares = (logits - greatest[:, None]).exp_()
        self.sum.mul_((self.most - greatest).exp_()).add_(shares.sum(dim=1))
        self.most.copy_(greatest)

    @property
    def normalizer(self) -> Tensor:
        """`log Σ exp(logit)`."""
        return self.most + self.sum.log()
