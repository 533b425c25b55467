"""When a learning rate rises and falls, and which rows meet in a batch: plain functions of step, seed and length."""

import math
import random
from collections.abc import Sequence
from typing import Literal

Decay = Literal["cosine", "linear", "constant"]

POOL_BATCHES = 16
"""Batches whose rows are sorted by length together: large enough to spare padding, small enough to stay shuffled."""


def learning_rate_share(step: int, *, steps: int, warmup: float, decay: Decay) -> float:
    """The share of the peak learning rate at a step, in (0, 1].

    Rises in equal parts over the first `ceil(warmup * steps)` steps, whose last has the peak, then falls to a small
    rest at the last step: with `x` the part of the remaining steps that is done before this one, `1 - x` or
    `(1 + cos(πx)) / 2`.

    Args:
        step: From 0 to `steps - 1`.
        steps: Of the whole run.
        warmup: Share of the steps on which the rate rises, from 0 to below 1.
        decay: Form of the fall.

    Example:
        >>> [learning_rate_share(step, steps=4, warmup=0.5, decay="linear") for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / (steps - rising)
    match decay:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "cosine":
            return (1.0 + math.cos(math.pi * done)) / 2.0


def bucketed_batches(lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Every row once, in batches of similar length and seeded order.

    Rows are shuffled, sorted by length within pools of 16 batches, cut into batches, and the batches shuffled.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch; the last cut may be smaller.
        seed: Of the run.
        epoch: Each epoch has its own order.

    Returns:
        Indices into `lengths`.
    """
    source = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    source.shuffle(order)
    pool = batch_size * POOL_BATCHES
    batches = []
    for start in range(0, len(order), pool):
        rows = sorted(order[start : start + pool], key=lambda row: lengths[row])
        batches += [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    source.shuffle(batches)
    return batches
