"""Terms of the loss around the base, in the patch, the drift and both at once, as values."""

import math
from dataclasses import dataclass

from portllm.measures.sums import Sums


@dataclass(frozen=True, slots=True)
class Terms(Sums):
    """The terms of one module, or their sums over modules; nats per completion token.

    Attributes:
        first_order_base: `<g0, Δ>`: below 0 where the patch lowers the loss of the base.
        first_order_evolved: `<g1, Δ>`.
        interference: `tr(Σ_δ D Σ_x Δᵀ)`: above 0 where drift and patch hinder each other.
        patch_curvature: `tr(Σ_δ Δ Σ_x Δᵀ)`.
        drift_curvature: `tr(Σ_δ D Σ_x Dᵀ)`, estimated.
    """

    first_order_base: float = 0.0
    first_order_evolved: float = 0.0
    interference: float = 0.0
    patch_curvature: float = 0.0
    drift_curvature: float = 0.0

    @property
    def cosine(self) -> float | None:
        """The interference as a cosine in the metric of the curvature; None where patch or drift do nothing."""
        norms = math.sqrt(self.patch_curvature * self.drift_curvature)
        return self.interference / norms if norms else None

    def to_json(self) -> dict[str, float | None]:
        """The terms; gains are first-order, with the sign that more is better."""
        return {
            "gain_on_base": -self.first_order_base,
            "gain_on_evolved": -self.first_order_evolved,
            "lost_gain": self.first_order_evolved - self.first_order_base,
            "interference": self.interference,
            "interference_cosine": self.cosine,
            "patch_curvature": self.patch_curvature,
            "drift_curvature": self.drift_curvature,
        }
