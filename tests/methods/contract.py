"""The laws of a port method, as one function that a method passes or fails; and a patch with a bit of everything."""

import math
from dataclasses import replace

import torch

from portllm.methods.contract import Inputs, Need, Pair, Seen
from portllm.methods.values import computed, whole
from portllm.patch.adapter_config import AdapterConfig
from portllm.patch.delta import ExpertsDelta, LowRankDelta, RowValues, VectorDelta, WholeValue
from portllm.patch.patch import Patch
from tests.methods.chains import TwoChains

ROUNDING = 1e-5
"""Of float32: a method without drift may compute, but it ends where it began."""


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


RELATIVE = Patch(
    "plain",
    deltas={
        "layers.0.q_proj": LowRankDelta(numbers(4, 12, seed=0), numbers(18, 4, seed=1), scale=1.5),
        "layers.1.q_proj": LowRankDelta(numbers(4, 12, seed=2), numbers(18, 4, seed=3), scale=0.5),
        "layers.0.c_attn": LowRankDelta(numbers(3, 10, seed=4), numbers(14, 3, seed=5), scale=2.0, transposed=True),
    },
    config=AdapterConfig({}),
    record=None,
    bias_deltas={"layers.0.q_proj.bias": VectorDelta(numbers(18, seed=6), scale=1.5)},
    experts={"layers.0.experts.down_proj": ExpertsDelta(numbers(6, 12, seed=7), numbers(20, 6, seed=8), 1.0, rank=2)},
)
MIXED = replace(
    RELATIVE,
    name="mixed",
    deltas={
        **RELATIVE.deltas,
        "layers.0.k_proj": LowRankDelta(
            numbers(4, 12, seed=9), numbers(18, 4, seed=10), 1.5, magnitude=numbers(18, seed=11).abs() + 1
        ),
    },
    values={"norm.weight": WholeValue(numbers(12, seed=12)), "head.weight": WholeValue(numbers(30, 12, seed=13))},
    rows={"embed.weight": RowValues(numbers(3, 12, seed=14), (2, 7, 4))},
)
PLAIN = replace(RELATIVE, name="plain LoRA", bias_deltas={}, experts={})
PATCHES = {"plain": PLAIN, "relative": RELATIVE, "with what is held whole": MIXED}

BASE = {
    "layers.0.q_proj.weight": numbers(18, 12, seed=20),
    "layers.1.q_proj.weight": numbers(18, 12, seed=21),
    "layers.0.k_proj.weight": numbers(18, 12, seed=22),
    "layers.0.c_attn.weight": numbers(10, 14, seed=23),
    "layers.0.q_proj.bias": numbers(18, seed=24),
    "layers.0.experts.down_proj": numbers(3, 20, 12, seed=25),
    "norm.weight": numbers(12, seed=26),
    "head.weight": numbers(30, 12, seed=27),
    "embed.weight": numbers(30, 12, seed=28),
}
EVOLVED = {name: weight + 0.1 * numbers(*weight.shape, seed=40 + n) for n, (name, weight) in enumerate(BASE.items())}


def run(method, patch, *, evolved):
    """What a method makes of a patch: the ported patch in memory, and the evidence; it is given what it declared."""
    needs = method.needs_for(patch)
    sides = [{name: computed(name, weight) for name, weight in side.items()} for side in (BASE, evolved)]
    given = Inputs(*sides) if Need.WEIGHTS in needs else Inputs()
    if Need.STREAMS in needs:
        given = replace(given, streams=lambda added: TwoChains(patch, added.mapped(whole), BASE, evolved))
    if Need.PAIRS in needs:
        given = replace(
            given, pairs=lambda modules: (pair(module, patch.deltas[module], evolved) for module in modules)
        )
    ported = method.port(patch.mapped(lambda tensor: computed("a tensor", tensor)), given)
    return ported.patch.mapped(whole), ported.evidence


def pair(module, delta, evolved):
    """What a module makes of the same inputs with the weights of both models."""
    x = numbers(64, delta.a.shape[1], seed=70)
    weights = (side[f"{module}.weight"] for side in (BASE, evolved))
    return Pair(module, *(Seen(x, (x @ (weight if delta.transposed else weight.T)).abs()) for weight in weights))


def effects(patch, weights):
    """The tuned weights that a patch makes of a model's, in float64."""
    weights = {name: weight.double() for name, weight in weights.items()}
    tuned = {}
    for module, delta in patch.deltas.items():
        change = delta.scale * (delta.b.double() @ delta.a.double())
        weight = weights[f"{module}.weight"].T if delta.transposed else weights[f"{module}.weight"]
        made = weight + change
        if delta.magnitude is not None:
            made = delta.magnitude.double()[:, None] * made / made.norm(dim=1, keepdim=True)
        tuned[module] = made
    for name, bias in patch.bias_deltas.items():
        tuned[name] = weights[name] + bias.scale * bias.values.double()
    for name, experts in patch.experts.items():
        n, rank = experts.n_experts, experts.rank
        a = experts.a.double().reshape(n, rank, -1)
        b = torch.stack([experts.b[:, number::n].double() for number in range(n)])
        tuned[name] = weights[name] + experts.scale * (b @ a)
    tuned |= {name: value.values.double() for name, value in patch.values.items()}
    for name, rows in patch.rows.items():
        tuned[name] = weights[name].index_copy(0, torch.tensor(rows.rows), rows.values.double())
    return tuned


def require_contract(method, patch):
    """Raise AssertionError, or whatever the method raises, where it breaks a law."""
    given = patch.mapped(torch.clone)
    weights = {name: weight.clone() for name, weight in EVOLVED.items()}
    ported, evidence = run(method, given, evolved=weights)
    assert_equal(given, patch, "its input was changed")
    assert all(weights[name].equal(weight) for name, weight in EVOLVED.items()), "a weight was changed"
    for name, number in evidence.items():
        assert isinstance(number, float), f"evidence {name} is no number"
        assert math.isfinite(number), f"evidence {name} is not finite"
    assert_same_outline(ported, patch)
    for tensor in tensors(ported):
        assert tensor.isfinite().all(), "a number of the ported patch is not finite"

    again, evidence_again = run(method, patch, evolved=EVOLVED)
    assert_equal(ported, again, "the same inputs gave another result")
    assert evidence == evidence_again, "the same inputs gave other evidence"

    still, _ = run(method, patch, evolved=BASE)
    before, after = effects(patch, BASE), effects(still, BASE)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert (weight - after[name]).norm() <= ROUNDING * weight.norm(), f"without drift {name} changed"


def assert_same_outline(ported, patch):
    """Same modules and tensors, shapes and scales: what PEFT makes of the new folder is what the method meant.

    Factors of another rank have the scale that the new configuration says.
    """
    for part in ("deltas", "bias_deltas", "experts"):
        old, new = getattr(patch, part), getattr(ported, part)
        assert new.keys() == old.keys(), f"{part} are others"
        for name, delta in new.items():
            assert outline(delta) == outline(old[name]), f"{part} are others"
            is_configured = part == "deltas" and "r" in ported.config.fields
            scale = ported.config.scale_of(name) if is_configured else old[name].scale
            assert delta.scale == scale, f"{part} are others"
    assert {name: v.values.shape for name, v in ported.values.items()} == {
        name: v.values.shape for name, v in patch.values.items()
    }
    assert {name: r.rows for name, r in ported.rows.items()} == {name: r.rows for name, r in patch.rows.items()}


def outline(delta):
    return delta.values.shape if hasattr(delta, "values") else delta.shape


def tensors(patch):
    found = []
    patch.mapped(lambda tensor: found.append(tensor) or tensor)
    return found


def assert_equal(one, other, message):
    pairs = zip(tensors(one), tensors(other), strict=True)
    assert all(left.equal(right) and left.dtype == right.dtype for left, right in pairs), message


def rescaled(patch, factors):
    """A patch with the B of each module times a number."""
    return replace(
        patch,
        deltas={
            module: replace(delta, b=computed(f"{module}.b", whole(delta.b) * factors[module]))
            for module, delta in patch.deltas.items()
        },
    )
