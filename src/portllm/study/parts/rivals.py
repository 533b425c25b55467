"""What an aligned port is compared with, beside addition and retraining: by what else could its score be explained?

Each is a port method that only studies know. `random` adds a patch that was learned nowhere, of the same norm: it says
what any change of that size does. `random-align` fits that one, from the same prompts: it says what of an aligned port
is the fit, and what the patch. `truncated` is the best patch of the rank that makes the evolved weights the old
specialist's, `W_old + Δ - W_new`. Distillation is not a port, and stands in `portllm.training`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from portllm.methods.contract import Inputs, Need, Ported, PortMethod
from portllm.methods.table import METHODS
from portllm.methods.values import Values
from portllm.patch.patch import Patch

if TYPE_CHECKING:
    from portllm.patch.delta import LowRankDelta

DISTILLED = "distilled"
"""Gradient steps on the old specialist's answers, from the patch as it is added."""

ANSWER_TOKENS = 32
"""Of an answer of the old specialist, at most."""

SEED = 0


def _random(patch: Patch[Values], inputs: Inputs) -> Ported:
    return METHODS["add"].port(drawn_anew(patch), inputs)


def _random_align(patch: Patch[Values], inputs: Inputs) -> Ported:
    return METHODS["align"].port(drawn_anew(patch), inputs)


def _truncated(patch: Patch[Values], inputs: Inputs) -> Ported:
    return Ported(replace(patch, deltas={name: _nearest(name, delta, inputs) for name, delta in patch.deltas.items()}))


RIVALS: Mapping[str, PortMethod] = {
    rival.id: rival
    for rival in (
        PortMethod("random", _random, "add a random patch of the same norm", "control"),
        PortMethod(
            "random-align",
            _random_align,
            "fit a random patch of the same norm",
            "control",
            frozenset({Need.STREAMS}),
        ),
        PortMethod(
            "truncated",
            _truncated,
            "the old specialist's weights minus the evolved ones, truncated to the patch's rank",
            "Eckart and Young (1936)",
            frozenset({Need.WEIGHTS}),
        ),
    )
}
"""By id, as rows of `METHODS`."""

UNMEASURED = (*(rival.id for rival in RIVALS.values() if Need.STREAMS not in rival.needs), DISTILLED)
"""Those that do not measure themselves on prompts."""


def drawn_anew(patch: Patch[Values]) -> Patch[Values]:
    """A patch with normal factors in the place of its own, each product of the same Frobenius norm.

    Raises:
        ValueError: It holds more than low-rank deltas of linear modules.
    """
    import torch

    from portllm.methods.values import computed, whole

    generator = torch.Generator().manual_seed(SEED)

    def drawn(name: str, delta: "LowRankDelta[Values]") -> "LowRankDelta[Values]":
        a, b = (whole(values).float() for values in (delta.a, delta.b))
        new_a, new_b = (torch.randn(values.shape, generator=generator) for values in (a, b))
        size = torch.linalg.matrix_norm(b @ a) / torch.linalg.matrix_norm(new_b @ new_a)
        return replace(delta, a=computed(f"{name}.a", new_a), b=computed(f"{name}.b", size * new_b))

    _require_plain(patch)
    return replace(patch, deltas={name: drawn(name, delta) for name, delta in sorted(patch.deltas.items())})


def _nearest(name: str, delta: "LowRankDelta[Values]", inputs: Inputs) -> "LowRankDelta[Values]":
    """The delta of the same rank that is nearest to `W_old + Δ - W_new`, by its leading singular vectors."""
    import torch

    from portllm.methods.values import computed, whole
    from portllm.patch.adapter_tensors import WEIGHT

    a, b = (whole(values).double() for values in (delta.a, delta.b))
    old, new = (whole(side[f"{name}{WEIGHT}"]).double() for side in (inputs.base, inputs.evolved))
    u, sizes, vt = torch.linalg.svd(old - new + delta.scale * b @ a, full_matrices=False)
    rank = len(a)
    root = (sizes[:rank] / delta.scale).sqrt()
    return replace(
        delta,
        a=computed(f"{name}.a", (root[:, None] * vt[:rank]).float()),
        b=computed(f"{name}.b", (u[:, :rank] * root).float()),
    )


def _require_plain(patch: Patch[Values]) -> None:
    if not patch.is_plain_lora:
        raise ValueError("rivals are made of patches of low-rank deltas of linear modules alone")
