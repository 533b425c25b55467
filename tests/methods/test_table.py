"""Every row of METHODS keeps the contract of a port method; wrong ones break it, and a right one need not be simple."""

import re
from dataclasses import replace
from itertools import count

import pytest
import torch

from portllm.checkpoint.open import open_checkpoint
from portllm.errors import NonFiniteError, PlanRefusedError, UnknownMethodError
from portllm.methods.add import add, add_suits
from portllm.methods.contract import Inputs, Need, Ported, PortMethod
from portllm.methods.table import METHODS, method_named
from portllm.methods.values import Computed, computed, whole
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from portllm.tensors.tensors import load
from tests.methods.contract import EVOLVED, MIXED, PATCHES, RELATIVE, require_contract, rescaled, run

WEIGHTS = frozenset({Need.WEIGHTS})


def row(port, *, needs=frozenset(), suits=add_suits):
    return PortMethod("tried", port, "tried in a test", "none", needs, suits)


def along_the_update(patch, inputs):
    """Each delta times the factor that fits W1 to c·W0 best, in the least squares; what is held whole as by addition.

    A rotation in rank space, B R and R⁻¹ A, goes with it: it changes every factor, and no delta.
    """
    factors = {}
    for module in patch.deltas:
        base, evolved = (whole(side[f"{module}.weight"]).double() for side in (inputs.base, inputs.evolved))
        factors[module] = ((base * evolved).sum() / base.square().sum()).item()
    moved = rescaled(add(patch, inputs).patch, factors)
    turned = {}
    for module, delta in moved.deltas.items():
        a, b = whole(delta.a).double(), whole(delta.b).double()
        turn = torch.linalg.qr(b).R  # b = q r: the columns of b become orthonormal, and a takes what they had
        turned[module] = replace(
            delta,
            a=computed(f"{module}.a", (turn @ a).float()),
            b=computed(f"{module}.b", torch.linalg.solve(turn, b, left=False).float()),
        )
    mean = sum(factors.values()) / len(factors)
    return Ported(replace(moved, deltas=turned), {"factor": float(f"{mean:.6g}")})


RIGHT = row(along_the_update, needs=WEIGHTS)


def louder(patch, inputs):
    return Ported(rescaled(add(patch, inputs).patch, dict.fromkeys(patch.deltas, 2.0)))


def moody(patch, inputs, calls=count()):  # noqa: B008 (it is meant to remember)
    return Ported(add(patch, inputs).patch, {"call": float(next(calls))})


def careless(patch, inputs):
    whole(next(iter(patch.deltas.values())).b).mul_(2.0)
    return add(patch, inputs)


def rough(patch, inputs):
    whole(inputs.evolved["layers.0.q_proj.weight"]).zero_()
    return add(patch, inputs)


def boastful(patch, inputs):
    return Ported(add(patch, inputs).patch, {"kept": float("nan")})


def greedy(patch, inputs):
    return Ported(add(patch, inputs).patch, {"first": whole(inputs.base["layers.0.q_proj.weight"])[0, 0].item()})


def forgetful(patch, inputs):
    _, *rest = add(patch, inputs).patch.deltas.items()
    return Ported(replace(add(patch, inputs).patch, deltas=dict(rest)))


def misunderstood(patch, inputs):
    """Doubles the scale and halves B: the same delta, but a scale that no file of PEFT's says."""
    moved = rescaled(add(patch, inputs).patch, dict.fromkeys(patch.deltas, 0.5))
    return Ported(replace(moved, deltas={m: replace(d, scale=2 * d.scale) for m, d in moved.deltas.items()}))


def adrift(patch, inputs):
    """Subtracts what it should add: wrong for what is held whole alone, so that only such a patch shows it."""
    moved = add(patch, inputs).patch
    values = {
        name: replace(value, values=computed(name, 2 * whole(inputs.base[name]) - whole(value.values)))
        for name, value in moved.values.items()
    }
    return Ported(replace(moved, values=values))


WRONG = {
    louder: "without drift",
    moody: "other evidence",
    careless: "its input was changed",
    boastful: "not finite",
    greedy: "q_proj",
    forgetful: "deltas are others",
    misunderstood: "deltas are others",
}


CARRIED = {
    f"{method.id}-{kind}": (method, patch)
    for method in METHODS.values()
    for kind, patch in PATCHES.items()
    if method.refuses(patch) is None
}


@pytest.mark.parametrize(("method", "patch"), CARRIED.values(), ids=CARRIED.keys())
def test_every_method_keeps_the_contract(method, patch):
    require_contract(method, patch)


def test_a_method_refuses_what_it_does_not_carry_and_every_plain_patch_is_carried_by_all():
    kept = {(method.id, patch.name) for method, patch in CARRIED.values()}
    assert {(method, "plain LoRA") for method in METHODS} <= kept
    assert ("transport", "mixed") not in kept


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES.keys())
def test_a_method_that_is_not_the_identity_keeps_the_contract(patch):
    require_contract(RIGHT, patch)
    ported, evidence = run(RIGHT, patch, evolved=EVOLVED)
    assert evidence["factor"] != 1
    for module, delta in patch.deltas.items():
        assert not torch.allclose(ported.deltas[module].b @ ported.deltas[module].a, delta.b @ delta.a)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_wrong_method_breaks_the_contract(wrong):
    with pytest.raises((AssertionError, KeyError), match=WRONG[wrong]):
        require_contract(row(wrong), RELATIVE)


def test_a_method_that_changes_a_weight_breaks_the_contract():
    with pytest.raises(AssertionError, match="a weight was changed"):
        require_contract(row(rough, needs=WEIGHTS), RELATIVE)


def test_a_method_that_is_wrong_for_what_is_held_whole_alone_breaks_the_contract():
    require_contract(row(adrift), RELATIVE)
    with pytest.raises(AssertionError, match="without drift (norm|head).weight changed"):
        require_contract(row(adrift), MIXED)


@pytest.mark.parametrize("method", METHODS)
def test_every_row_says_what_it_is(method):
    found = METHODS[method]
    assert found.id == method == method_named(method).id
    assert re.fullmatch(r"[a-z][a-z0-9-]*", found.id)
    assert found.summary
    assert re.search(r"arXiv|docs/methods", found.reference)


def test_addition_passes_on_what_is_added_without_reading_it():
    def unread(start, stop):
        raise AssertionError("it was read")

    patch = RELATIVE.mapped(lambda tensor: Computed("unread", tuple(tensor.shape), unread))
    assert METHODS["add"].port(patch, Inputs()).patch == patch


def test_a_method_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(UnknownMethodError, match=r"unknown port method 'teleport'; available: add"):
        method_named("teleport")


# ---- a row of the table, and nothing else: through the whole of a port


@pytest.fixture
def tried(monkeypatch):
    """Puts a method into the table."""
    return lambda method: monkeypatch.setitem(METHODS, method.id, method)


def test_a_new_row_is_ported_by_and_its_evidence_is_recorded(tried, tiny, tmp_path):
    tried(RIGHT)
    base, evolved = open_checkpoint(tiny("base")), open_checkpoint(tiny("evolved", drift=0.5))
    patch = load_patch(tiny("adapter"))
    ported = port(patch, base=base, evolved=evolved, method="tried", out=tmp_path / "ported")
    (step,) = ported.record.ports
    assert step.method == "tried"
    assert set(step.evidence) == {"sampled_drift", "sampled_cosine", "factor"}
    for module, delta in patch.deltas.items():
        old, new = (load(info(f"{module}.weight")).double() for info in (base.info, evolved.info))
        factor = (old * new).sum() / old.square().sum()
        expected = factor * (load(delta.b).double() @ load(delta.a).double())
        found = load(ported.deltas[module].b).double() @ load(ported.deltas[module].a).double()
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_method_that_reads_weights_is_refused_without_the_base(tried, tiny, tmp_path):
    from portllm.capturing.adapter import capture_adapter

    tried(RIGHT)
    base, evolved = (open_checkpoint(tiny(kind)) for kind in ("base", "evolved"))
    patch = capture_adapter(load_patch(tiny("adapter")), base=base, out=tmp_path / "patch")
    with pytest.raises(PlanRefusedError, match="method 'tried' reads the weights of the model that"):
        port(patch, evolved=evolved, method="tried", out=tmp_path / "ported")


def test_a_method_that_computes_no_numbers_leaves_nothing(tried, tiny, tmp_path):
    tried(row(lambda patch, inputs: Ported(rescaled(patch, dict.fromkeys(patch.deltas, float("inf"))))))
    with pytest.raises(NonFiniteError, match=r"\.b': contains an infinity"):
        port(
            load_patch(tiny("adapter")),
            base=open_checkpoint(tiny("base")),
            evolved=open_checkpoint(tiny("evolved")),
            method="tried",
            out=tmp_path / "ported",
        )
    assert list(tmp_path.iterdir()) == []


def test_the_table_is_climbed_by_what_its_rows_say(tried, tiny, tmp_path):
    def suits(answer, evidence):
        return "it was tried" if answer == "will not hold" and evidence["drift"] > 0.5 else None

    tried(row(along_the_update, needs=WEIGHTS, suits=suits))
    base, other = open_checkpoint(tiny("base")), open_checkpoint(tiny("base", seed=7))
    patch = load_patch(tiny("adapter"))
    (step,) = port(patch, base=base, evolved=other, method="auto", out=tmp_path / "far").record.ports
    assert (step.method, step.choice.is_forced) == ("tried", False)
    assert step.choice.reason.startswith("it was tried: ")
    assert {"drift", "factor"} <= step.evidence.keys()
    (step,) = port(patch, base=base, evolved=base, method="auto", out=tmp_path / "near").record.ports
    assert step.method == "add"
