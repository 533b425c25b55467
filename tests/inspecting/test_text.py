"""What inspect prints of a patch that has come a long way."""

from portllm.inspecting.inspect import PatchSummary
from portllm.inspecting.text import render_summary
from portllm.patch.record import Capture, Choice, ModelIdentity, PatchRecord, PortStep

V1, V2, V3 = (ModelIdentity(f"v{number}", f"s4k1:{str(number) * 40}", None) for number in (1, 2, 3))
STEPS = (
    PortStep(V1, V2, "add", {"sampled_drift": 0.003}),
    PortStep(V2, V3, "add", {}, choice=Choice("uncertain", "why", (), True)),
)
TRAINED = {"method": "train", "settings": {"rank": 8}}


def told(capture, ports):
    record = PatchRecord("0.1.0", ports[-1].target if ports else V1, capture, ports, {}, {})
    summary = PatchSummary(
        name="p", revision=None, n_modules=0, modules={}, ranks={}, scales={}, n_params=0, n_bytes=0, whole=(),
        token_rows={}, copies=(), beside=(), nothing=None, changed_base=None, base_name=None, base_revision=None,
        record=record,
    )  # fmt: skip
    return render_summary(summary).split("lineage\n")[-1].splitlines()


def test_ports_are_the_branches_of_a_tree_oldest_first():
    assert told(Capture("train", {"rank": 8}), STEPS) == [
        "  by train, rank 8",
        f"  |- to v2 by 'add', drift 0.300 % ({V2.fingerprint})",
        f"  `- to v3 by 'add', by force: the verdict was 'uncertain' ({V3.fingerprint})",
    ]


def test_what_went_into_a_combination_is_named_with_its_own_way():
    models = {end: {"name": model.name, "fingerprint": model.fingerprint, "digest": None}
              for end, model in (("from", V1), ("to", V2))}  # fmt: skip
    step = {**models, "method": "add", "evidence": {}}
    inputs = [
        {"name": "old", "weight": 1, "tensors": "", "capture": TRAINED, "ports": [step]},
        {"name": "new", "weight": 0.5, "tensors": "", "capture": TRAINED, "ports": []},
    ]
    capture = Capture("combine", {"method": "exact", "inputs": inputs, "truncation_residual": 0.0})
    assert told(capture, STEPS) == [
        "  combined: exact, truncation residual 0",
        "  |- 1 x old: by train, rank 8",
        f"  |  `- to v2 by 'add' ({V2.fingerprint})",
        "  |- 0.5 x new: by train, rank 8",
        f"  `- to v3 by 'add', by force: the verdict was 'uncertain' ({V3.fingerprint})",
    ]


def test_a_record_that_says_its_inputs_otherwise_is_still_shown():
    assert told(Capture("combine", {"method": "exact", "inputs": [{"name": 1}]}), ())[0] == "  combined: exact"
