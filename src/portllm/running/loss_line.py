"""The loss along the straight line between two patches of one model, and the barrier on it.

The model at t is `W + (1 - t) Δ + t Δ'`: both adapters are switched on, their scales times `1 - t` and `t`, so that no
product and no third adapter is formed and nothing is rounded but the sum of the outputs. The barrier is how far the
loss rises above the straight line between its ends (Entezari et al., 2022, arXiv 2110.06296, definition 1); two patches
without one lie in the same basin (linear mode connectivity: Frankle et al., 2020, arXiv 1912.05671).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from portllm.foreign import LoraLayer, PeftModel


@dataclass(frozen=True, slots=True)
class LossLine:
    """Losses of the same rows at some points of the line.

    Attributes:
        points: Values of t, rising from 0, the first patch, to 1, the other.
        losses: At each point, the loss of each row.

    Example:
        >>> line = LossLine((0.0, 0.5, 1.0), ((1.0, 1.0), (3.0, 2.0), (2.0, 2.0)))
        >>> line.means, line.barrier, line.barrier_error
        ((1.0, 2.5, 2.0), 1.0, 0.5)
    """

    points: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        rising = all(before < after for before, after in zip(self.points, self.points[1:], strict=False))
        if not rising or len(self.points) < 2 or (self.points[0], self.points[-1]) != (0.0, 1.0):
            raise ValueError(f"points {self.points}: must rise from 0 to 1.")
        if len(self.losses) != len(self.points) or not self.losses[0] or len(set(map(len, self.losses))) != 1:
            raise ValueError("losses: must have one entry per point, each over the same rows.")

    @property
    def means(self) -> tuple[float, ...]:
        """The mean loss at each point."""
        return tuple(math.fsum(rows) / len(rows) for rows in self.losses)

    @property
    def barrier(self) -> float:
        """`max_t loss(t) - (1 - t) loss(0) - t loss(1)`: 0 where the loss never lies above the line, as at its ends."""
        return self._rises[self._top][0]

    @property
    def barrier_at(self) -> float:
        """The t of the barrier."""
        return self.points[self._top]

    @property
    def barrier_error(self) -> float:
        """The standard error over rows of the rise at that t, taken as chosen beforehand; 0 for a single row."""
        return self._rises[self._top][1]

    @property
    def _top(self) -> int:
        return max(range(len(self.points)), key=lambda number: self._rises[number][0])

    @property
    def _rises(self) -> list[tuple[float, float]]:
        """At each point the mean rise above the straight line, and its standard error."""
        found = []
        for t, losses in zip(self.points, self.losses, strict=True):
            ends = zip(losses, self.losses[0], self.losses[-1], strict=True)
            rises = [loss - (1 - t) * first - t * last for loss, first, last in ends]
            mean = math.fsum(rises) / len(rises)
            spread = math.fsum((rise - mean) ** 2 for rise in rises)
            found.append((mean, math.sqrt(spread / max(1, len(rises) - 1) / len(rises))))
        return found

    def to_json(self) -> dict[str, object]:
        """Points, mean losses and the barrier."""
        return {
            "points": list(self.points),
            "losses": list(self.means),
            "barrier": self.barrier,
            "barrier_at": self.barrier_at,
            "barrier_error": self.barrier_error,
            "rows": len(self.losses[0]),
        }


def measure_line(
    model: PeftModel,
    first: str,
    last: str,
    *,
    points: Sequence[float],
    losses_of: Callable[[PeftModel], Sequence[float]],
) -> LossLine:
    """The losses on the line between two adapters of a model.

    Args:
        model: With both adapters on it; plain LoRA, whose deltas scale with `scaling`.
        first: Name of the adapter at t = 0.
        last: Of the one at t = 1.
        points: Values of t, rising from 0 to 1.
        losses_of: The loss of each held-out row, for the model as it is given.

    Raises:
        ValueError: The points do not rise from 0 to 1.
    """
    losses = []
    for t in points:
        with blended(model, {first: 1 - t, last: t}):
            losses.append(tuple(losses_of(model)))
    return LossLine(tuple(points), tuple(losses))


@contextlib.contextmanager
def blended(model: PeftModel, weights: Mapping[str, float]) -> Iterator[None]:
    """Inside the block the model is `W + Σ w_i Δ_i`; after it, its adapters and their scales are as before.

    Args:
        model: With the adapters on it.
        weights: Of each adapter, by name.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    scales = [dict(layer.scaling) for layer in layers]
    active = list(model.active_adapters)
    try:
        model.base_model.set_adapter(list(weights), inference_mode=True)
        for layer in layers:
            for name, weight in weights.items():
                if name in layer.scaling:
                    layer.scaling[name] *= weight
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling.update(scale)
        model.base_model.set_adapter(active, inference_mode=True)
