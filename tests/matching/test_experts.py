"""Experts that are adapted all at once (`target_parameters`): as PEFT has them, however the file stores the experts."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.capturing.adapter import capture_adapter
from portllm.capturing.tuned import capture_tuned
from portllm.capturing.tuned_plan import plan_capture_tuned
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import AdapterFormatError, NonFiniteError, PlanRefusedError
from portllm.inspecting.inspect import inspect
from portllm.merging.merge import merge
from portllm.merging.options import MergeOptions
from portllm.merging.plan import plan_merge
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from portllm.tensors.tensors import load

F32_LOGITS = 2e-4
"""Logits of size 1 to 10 from weights in float32, once merged and once not: the sums differ in their last bits."""

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "both": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": BOTH}),
    "one": ("qwen3-moe", {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj"]}),
    "alone": ("qwen3-moe", {"target_modules": None, "target_parameters": ["experts.gate_up_proj"]}),
    "patterns": (
        "qwen2-moe",
        {
            "target_modules": ["shared_expert_gate"],
            "target_parameters": BOTH,
            "rank_pattern": {"down_proj": 3},
            "alpha_pattern": {r"layers\\.1\\..*gate_up_proj": 9},
        },
    ),
    "rank-stabilized": ("mixtral", {"target_modules": ["k_proj"], "target_parameters": BOTH, "use_rslora": True}),
    # PEFT turns the modules of transformers 4 into the parameters that they have become.
    "as in transformers 4": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3", "gate"]}),
    "router": ("qwen3-moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}),
}

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of tiny vocabularies and of patterns


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Base and adapter of a case, each written when first asked for."""
    from tests import families as tiny

    kept = {}

    def make(case, *, dtype=torch.float32, current=False):
        key = (case, dtype, current)
        if key not in kept:
            kind, lora = CASES[case]
            folder = tmp_path_factory.mktemp(kind)
            how = {"dtype": dtype, "tied": False, "current": current}
            base = tiny.make_base(kind, folder / "base", **how)
            adapter = tiny.make_adapter(kind, base, folder / "adapter", **lora)
            kept[key] = SimpleNamespace(kind=kind, base=base, adapter=adapter)
        return kept[key]

    return make


@pytest.fixture
def rewritten(made, tmp_path):
    """An adapter of a case with other fields or tensors."""

    def rewrite(case, *, change=None, **fields):
        files = made(case)
        folder = tmp_path / "rewritten"
        folder.mkdir()
        config = json.loads((files.adapter / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
        tensors = load_file(files.adapter / "adapter_model.safetensors")
        save_file(tensors if change is None else change(tensors), folder / "adapter_model.safetensors")
        return folder

    return rewrite


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal_bytes(ours, theirs):
    assert set(ours) == set(theirs)
    differing = [
        n for n, tensor in theirs.items() if not torch.equal(ours[n].view(torch.uint8), tensor.view(torch.uint8))
    ]
    assert differing == []


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(14).reshape(2, 7)).logits


@pytest.mark.parametrize("current", [False, True], ids=["one by one", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_merged_bytes_equal_those_of_peft_in_float32(case, current, made, tmp_path):
    from tests import families as tiny

    files = made(case, current=current)
    merge(load_patch(files.adapter), into=open_checkpoint(files.base), out=tmp_path / "ours")
    tiny.merge_with_peft(files.kind, files.base, files.adapter, tmp_path / "peft", current=current)
    ours, base = weights(tmp_path / "ours"), weights(files.base)
    assert_equal_bytes(ours, weights(tmp_path / "peft"))
    assert any(not torch.equal(ours[name], base[name]) for name in base if "mlp" in name or "moe" in name)


@pytest.mark.parametrize("current", [False, True], ids=["one by one", "fused"])
def test_in_bfloat16_the_sum_is_rounded_once(current, made, tmp_path):
    from tests import families as tiny

    files = made("both", dtype=torch.bfloat16, current=current)
    merge(load_patch(files.adapter), into=open_checkpoint(files.base), out=tmp_path / "ours")
    # PEFT rounds the delta and then the sum; in float32 it rounds neither.
    wide = tiny.load_tuned(files.kind, files.base, files.adapter, dtype=torch.float32).merge_and_unload()
    wide.bfloat16().save_pretrained(tmp_path / "once", save_original_format=not current)
    assert_equal_bytes(weights(tmp_path / "ours"), weights(tmp_path / "once"))


@pytest.mark.parametrize("case", ["both", "alone", "patterns", "router"])
def test_a_ported_adapter_is_loaded_by_peft_whole(case, made, tmp_path):
    from tests import families as tiny

    files = made(case)
    patch = capture_adapter(load_patch(files.adapter), base=open_checkpoint(files.base), out=tmp_path / "patch")
    evolved = tiny.make_base(files.kind, tmp_path / "evolved", seed=7, dtype=torch.float32, tied=False)
    ported = port(patch, evolved=open_checkpoint(evolved), out=tmp_path / "ported")
    merge(ported, into=open_checkpoint(evolved), out=tmp_path / "merged")
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (files.adapter, tmp_path / "ported")]
    assert_equal_bytes(*tensors)

    alone = logits(tiny.load(files.kind, evolved))
    with_adapter = logits(tiny.load_tuned(files.kind, evolved, tmp_path / "ported"))
    assert (with_adapter - logits(tiny.load(files.kind, tmp_path / "merged"))).abs().max() < F32_LOGITS
    assert (with_adapter - alone).abs().max() > 100 * F32_LOGITS


def test_an_adapter_of_experts_is_described(made):
    found = inspect(made("both").adapter)
    assert found.modules == {"q_proj": 2, "gate_up_proj": 2, "down_proj": 2}
    assert found.ranks == {4: 6}
    stored = load_file(made("both").adapter / "adapter_model.safetensors")
    assert found.n_params == sum(tensor.numel() for tensor in stored.values())


def test_a_model_with_fewer_experts_is_refused(made, tmp_path):
    files = made("both")
    for folder, current in (("alone", False), ("fused", True)):
        fewer = tmp_path / folder
        fewer.mkdir()
        tensors = weights(made("both", current=current).base)
        cut = {n: t[:2].contiguous() if t.ndim == 3 else t for n, t in tensors.items() if ".experts.2." not in n}
        save_file(cut, fewer / "model.safetensors")
        (fewer / "config.json").write_text((files.base / "config.json").read_text())
        refusals = plan_merge(load_patch(files.adapter), into=open_checkpoint(fewer)).refusals
        assert [refusal.where for refusal in refusals if "experts=2" in refusal.reason] == [
            f"model.layers.{layer}.{name}" for layer in range(2) for name in sorted(BOTH)
        ]


def test_a_model_of_no_family_is_refused(made, tmp_path):
    files = made("both", current=True)
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes((files.base / "model.safetensors").read_bytes())
    (base / "config.json").write_text('{"model_type": "foreign", "tie_word_embeddings": false}')
    with pytest.raises(PlanRefusedError, match="the model type 'foreign' of .* is not known"):
        merge(load_patch(files.adapter), into=open_checkpoint(base), out=tmp_path / "never")


@pytest.mark.parametrize("current", [False, True], ids=["one by one", "fused"])
def test_experts_that_are_named_and_missing_are_refused(current, made):
    files = made("both", current=current)
    patch = load_patch(files.adapter)
    first, *rest = patch.experts
    lacking = replace(patch, experts={name: patch.experts[name] for name in rest})
    assert [refusal.where for refusal in plan_merge(lacking, into=open_checkpoint(files.base)).refusals] == [first]


def test_a_patch_of_experts_for_a_model_without_them_is_refused(made, tiny):
    patch = load_patch(made("both").adapter)
    refusals = plan_merge(patch, into=open_checkpoint(tiny("base"))).refusals
    assert set(patch.experts) <= {refusal.where for refusal in refusals}


def test_parameters_that_are_named_without_factors_are_refused(rewritten):
    with pytest.raises(AdapterFormatError, match="'target_parameters' names parameters of the model, but there are no"):
        load_patch(rewritten("both", change=lambda tensors: {n: t for n, t in tensors.items() if "q_proj" in n}))


def test_factors_that_are_not_named_are_refused(rewritten):
    with pytest.raises(AdapterFormatError, match="names none of its module"):
        load_patch(rewritten("both", target_parameters=[]))


def test_factors_of_fewer_parameters_than_are_named_are_refused(rewritten):
    def without_inner(tensors):
        return {name: tensor for name, tensor in tensors.items() if ".base_layer." not in name}

    with pytest.raises(AdapterFormatError, match="names down_proj, gate_up_proj of its parameters"):
        load_patch(rewritten("both", change=without_inner))


def test_several_parameters_of_a_module_whose_order_is_not_known_are_refused(rewritten):
    with pytest.raises(AdapterFormatError, match="can only be told apart"):
        load_patch(rewritten("both", target_parameters=["experts.one", "experts.two"]))


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}, {"fan_in_fan_out": True}])
def test_what_peft_does_not_do_to_parameters_is_refused(fields, rewritten):
    with pytest.raises(AdapterFormatError, match="is a parameter, for which PEFT has no"):
        load_patch(rewritten("alone", **fields))


def test_a_rank_that_does_not_divide_the_factors_is_refused(rewritten):
    with pytest.raises(AdapterFormatError, match=r"expected \(experts \* 5, in\)"):
        load_patch(rewritten("alone", r=5))


# ---- from two checkpoints


LAYOUTS = [(True, True), (False, False), (False, True), (True, False)]
"""Whether base and tuned model have their experts in one tensor."""
QUICK = {("one", (True, True)), ("patterns", (False, False)), ("router", (False, True))}


@pytest.mark.parametrize(
    ("case", "base_fused", "tuned_fused"),
    [
        pytest.param(case, *layout, marks=[] if case == "both" or (case, layout) in QUICK else pytest.mark.slow)
        for case in ("both", "one", "patterns", "router")
        for layout in LAYOUTS
    ],
)
def test_a_patch_captured_from_two_models_has_their_experts(case, base_fused, tuned_fused, made, tmp_path):
    from tests import families as tiny

    files = made(case, current=base_fused)
    tuned = tiny.merge_with_peft(files.kind, files.base, files.adapter, tmp_path / "tuned", current=tuned_fused)
    report = capture_tuned(open_checkpoint(files.base), open_checkpoint(tuned), out=tmp_path / "patch")
    adapter = load_patch(files.adapter)
    assert {name: delta.rank for name, delta in load_patch(tmp_path / "patch").experts.items()} == {
        name: delta.rank for name, delta in adapter.experts.items()
    }
    assert set(report.deltas) == {*adapter.deltas, *adapter.experts}
    assert (report.left_out, report.truncation_residual < 1e-4) == ({}, True)
    found = logits(tiny.load_tuned(files.kind, files.base, tmp_path / "patch"))
    expected = logits(tiny.load(files.kind, tuned))
    assert (found - expected).abs().max() < F32_LOGITS
    assert (logits(tiny.load(files.kind, files.base)) - expected).abs().max() > 0.01


def test_experts_that_need_fewer_directions_than_others_end_in_zeros(made, tmp_path):
    files = made("both", current=True)
    name = "model.layers.1.mlp.experts.down_proj"
    tuned = changed_copy(files.base, tmp_path / "tuned", lambda t: {**t, name: with_ranks(t[name], (2, 0, 1))})
    capture_tuned(open_checkpoint(files.base), open_checkpoint(tuned), out=tmp_path / "patch")
    patch = load_patch(tmp_path / "patch")
    assert (dict(patch.deltas), list(patch.experts), patch.experts[name].rank) == ({}, [name], 2)
    a = load(patch.experts[name].a).reshape(3, 2, -1)
    assert [int(rows.any(dim=1).sum()) for rows in a] == [2, 0, 1]
    merge(patch, into=open_checkpoint(files.base), out=tmp_path / "merged")
    assert torch.allclose(weights(tmp_path / "merged")[name], weights(tuned)[name], atol=1e-5)


def with_ranks(experts, ranks):
    """Each expert changed by a matrix of its rank."""
    moved = experts.clone()
    for number, rank in enumerate(ranks):
        for direction in range(rank):
            moved[number, direction, direction] += 1.0
    return moved


def changed_copy(source, folder, change):
    shutil.copytree(source, folder)
    save_file(change(weights(source)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda experts: experts[:2].contiguous(), "3 of (16, 12) in the base and 2 of (16, 12) in the tuned model"),
        (lambda experts: experts.to(torch.int8), "its experts are stored as I8"),
    ],
)
def test_experts_that_cannot_be_compared_are_refused(change, said, made, tmp_path):
    files = made("alone", current=True)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tuned = changed_copy(files.base, tmp_path / "tuned", lambda t: {**t, name: change(t[name])})
    (refusal,) = plan_capture_tuned(open_checkpoint(files.base), open_checkpoint(tuned)).refusals
    assert refusal.where == name
    assert said.replace("16", "32") in refusal.reason


def test_an_expert_that_is_not_finite_is_named(made, tmp_path):
    files = made("alone", current=True)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tuned = changed_copy(files.base, tmp_path / "tuned", lambda t: {**t, name: t[name] * float("nan")})
    with pytest.raises(NonFiniteError, match=name):
        capture_tuned(open_checkpoint(files.base), open_checkpoint(tuned), out=tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


def test_a_model_with_its_experts_stored_otherwise_is_refused_with_that_reason(made, tmp_path):
    from tests import families as tiny

    files = made("both")
    patch = capture_adapter(load_patch(files.adapter), base=open_checkpoint(files.base), out=tmp_path / "patch")
    fused = tiny.make_base(files.kind, tmp_path / "fused", dtype=torch.float32, tied=False, current=True)
    (refusal,) = plan_merge(patch, into=open_checkpoint(fused)).refusals
    assert refusal.where == "--into"
    assert "stores the experts differently (individually or stacked) also has another fingerprint" in refusal.reason
    assert plan_merge(patch, into=open_checkpoint(fused), options=MergeOptions(allow_other_base=True)).refusals == ()
