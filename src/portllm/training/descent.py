"""The loop of every training that fits factors: AdamW on what is trainable, a learning rate that rises and falls."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import torch

from portllm.errors import PortLLMError
from portllm.progress import Progress
from portllm.running.model import PeftModel
from portllm.training.schedule import Decay, learning_rate_share

Batch = TypeVar("Batch")


@runtime_checkable
class Descent(Protocol):
    """How steps are made, as `TrainSettings` and `EvolveSettings` say it."""

    @property
    def learning_rate(self) -> float:
        """At its peak."""

    @property
    def warmup(self) -> float:
        """Share of the steps on which it rises."""

    @property
    def decay(self) -> Decay:
        """How it falls afterwards."""

    @property
    def weight_decay(self) -> float:
        """Of AdamW."""

    @property
    def max_grad_norm(self) -> float:
        """Gradients are scaled down to this norm."""


def descend(
    model: PeftModel,
    batches: Sequence[Batch],
    loss_of: Callable[[Batch], Iterable[torch.Tensor]],
    how: Descent,
    *,
    label: str,
    progress: Progress,
) -> tuple[float, ...]:
    """One step for each batch; the model is in evaluation mode afterwards.

    Args:
        model: What of it requires a gradient is trained.
        batches: In order.
        loss_of: The mean loss of a batch, in summands.
        how: The rest.
        label: Of progress and messages: `train`, `evolve`.
        progress: Progress callback (steps).

    Returns:
        The loss of each step.

    Raises:
        PortLLMError: The loss is not finite.
    """
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=how.learning_rate, weight_decay=how.weight_decay)
    model.train()
    losses: list[float] = []
    progress(label, 0, len(batches), "steps")
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * learning_rate_share(
                step, steps=len(batches), warmup=how.warmup, decay=how.decay
            )
        optimizer.zero_grad(set_to_none=True)
        loss = backpropagated(loss_of(batch))
        if not math.isfinite(loss):
            raise PortLLMError(
                f"{label}: the loss is {loss} at step {step + 1} of {len(batches)}; nothing was written. "
                f"Lower the learning rate (now {how.learning_rate:g})."
            )
        torch.nn.utils.clip_grad_norm_(factors, how.max_grad_norm)
        optimizer.step()
        losses.append(loss)
        progress(f"{label}: loss {losses[-1]:.3f}", step + 1, len(batches), "steps")
    model.eval()
    return tuple(losses)


def backpropagated(summands: Iterable[torch.Tensor]) -> float:
    """The sum; gradients of each summand are added before the next is made, so that one at a time is in memory."""
    total = 0.0
    for summand in summands:
        torch.autograd.backward(summand)
        total += summand.item()
    return total
