"""Transport: a patch taken to a model that computes the same, or much the same, with other units.

Factors are taken to the other basis module by module (see `portllm.methods.basis`). What comes of it is measured as an
aligned port is: both models read prompts, and the ported patch is compared with plain addition by its divergence from
the old specialist on some of them, and by how often it answers as that does on others.

Source: this project, docs/methods/transport.md.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from portllm.methods.add import add
from portllm.methods.align import ADD, beyond_addition
from portllm.methods.basis import input_factor, output_factor
from portllm.methods.choice import choose, distance, on, weighed
from portllm.methods.contract import Inputs, Pair, Ported
from portllm.methods.measured import Measured, measures
from portllm.methods.values import Values, computed, whole
from portllm.patch.delta import LowRankDelta
from portllm.patch.patch import Patch

TRANSPORT = "transport"


@dataclass(frozen=True, slots=True)
class Carried:
    """A delta in the basis of the evolved model.

    Attributes:
        delta: The delta.
        misread: The share of what its old A reads that its new one does not.
        left_out: The share of its old B that is in no output of the tokens that were looked at.
    """

    delta: LowRankDelta[Values]
    misread: float
    left_out: float

    @classmethod
    def of(cls, delta: LowRankDelta[Values], pair: Pair) -> "Carried":
        """Take it there."""
        old_a, old_b = whole(delta.a), whole(delta.b)
        dtype = torch.promote_types(torch.promote_types(old_a.dtype, old_b.dtype), torch.float32)
        a, misread = input_factor(old_a, pair.before.x, pair.after.x)
        b, left_out = output_factor(old_b, pair.before.y, pair.after.y)
        factors = computed(delta.a.name, a.to(dtype)), computed(delta.b.name, b.to(dtype))
        return cls(replace(delta, a=factors[0], b=factors[1]), misread, left_out)


def transport(patch: Patch[Values], inputs: Inputs) -> Ported:
    """The patch in the evolved model's basis, or as it is added where that is no worse."""
    if inputs.streams is None or inputs.pairs is None:
        raise ValueError("transport was given no streams or no pairs, which it declares to need")
    found = {pair.module: Carried.of(patch.deltas[pair.module], pair) for pair in inputs.pairs(list(patch.deltas))}
    deltas = {module: found[module].delta for module in patch.deltas}
    made = {ADD: add(patch, inputs).patch, TRANSPORT: replace(patch, deltas=deltas)}
    tried = {name: Measured.of(name, inputs.streams(each)) for name, each in made.items()}
    rows = {name: _weighed(name, each) for name, each in tried.items()}
    chosen = choose(rows)
    lost = {name: max(getattr(each, name) for each in found.values()) for name in ("misread", "left_out")}
    numbers = measures(tried, chosen) | {key: float(f"{value:.6g}") for key, value in lost.items()}
    beyond = beyond_addition({name: each.price[name] for name, each in tried.items() if each.price})
    return Ported(made[chosen], numbers, ADD if chosen == ADD else None, weighed(rows, beyond))


def _weighed(name: str, tried: Measured) -> Tensor:
    """What the choice is made by: loss of right answers where there are some, else distance."""
    return tried.loss[name] if tried.loss else distance(on(tried.compared.nats, tried.streams.compared, "choose"))
