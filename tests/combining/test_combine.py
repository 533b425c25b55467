"""Combined patches on disk: float64 and PEFT as oracles, what is recorded, what is refused."""

import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import portllm
from portllm.checkpoint.safetensors.header_file import read_header
from portllm.combining.combine import combine
from portllm.combining.plan import Exact, Selected, plan_combine
from portllm.combining.side_by_side import side_by_side
from portllm.errors import NonFiniteError, OutputExistsError, PlanRefusedError
from portllm.patch.adapter_folder import load_patch
from portllm.patch.combine import concatenate
from portllm.patch.delta import LowRankDelta, WholeValue
from portllm.tensors.tensors import load
from tests.safetensors_files import contents

LOGIT_TOLERANCE = 1e-4


@pytest.fixture(scope="session")
def pair(tiny, tmp_path_factory):
    """Two patches of one base: all seven modules, and two of them with another rank and scale."""
    folder = tmp_path_factory.mktemp("pair")
    of = tiny("base", dtype=torch.float32)
    base = portllm.open_checkpoint(of)
    adapters = (
        tiny("adapter", of=of, seed=1),
        tiny("adapter", of=of, seed=2, r=3, lora_alpha=3, target_modules=["q_proj", "up_proj"]),
    )
    return [
        portllm.capture(load_patch(adapter), base=base, out=folder / name)
        for name, adapter in zip(("one", "two"), adapters, strict=True)
    ]


def dense(delta):
    return delta.scale * load(delta.b).double() @ load(delta.a).double()


def expected_of(pair, module, weights):
    parts = [(weight, patch.deltas.get(module)) for patch, weight in zip(pair, weights, strict=True)]
    return sum(weight * dense(delta) for weight, delta in parts if delta is not None)


@pytest.mark.parametrize("weights", [None, [0.5, -2.0]])
def test_the_combined_deltas_are_the_weighted_sum(pair, tmp_path, weights):
    report = combine(pair, out=tmp_path / "both", weights=weights)
    combined = load_patch(tmp_path / "both")
    assert set(combined.deltas) == set(pair[0].deltas)
    for module, delta in combined.deltas.items():
        expected = expected_of(pair, module, weights or [1.0, 1.0])
        assert torch.allclose(dense(delta), expected, rtol=1e-6, atol=1e-7), module
        assert delta.rank == (7 if "q_proj" in module or "up_proj" in module else 4)
    assert report.truncation_residual == 0.0


def test_the_exact_sum_has_the_bytes_that_tensors_give(pair, tmp_path):
    combine(pair, out=tmp_path / "both", weights=[0.3, -1.7])
    combined = load_patch(tmp_path / "both")
    for module, delta in combined.deltas.items():
        parts = [
            (w, patch.deltas[module]) for w, patch in zip((0.3, -1.7), pair, strict=True) if module in patch.deltas
        ]
        loaded = [LowRankDelta(a=load(part.a), b=load(part.b), scale=part.scale) for _, part in parts]
        expected = concatenate(loaded, weights=[weight for weight, _ in parts])
        assert torch.equal(load(delta.a), expected.a)
        assert torch.equal(load(delta.b), expected.b)


def test_factors_in_float64_are_rounded_once(tmp_path):
    factors = {"a": torch.rand(2, 5, dtype=torch.float64), "b": torch.rand(3, 2, dtype=torch.float64)}
    save_file(factors, tmp_path / "f.safetensors")
    infos = read_header(tmp_path / "f.safetensors").tensors
    delta = LowRankDelta(a=infos["a"], b=infos["b"], scale=0.7)
    a, b = side_by_side([delta, delta], weights=[1.0, 1 / 3], module="m")
    assert torch.equal(torch.from_numpy(a), torch.cat([factors["a"]] * 2).float())
    expected = torch.cat([factors["b"] * 0.7, factors["b"] * (0.7 / 3)], dim=1).float()
    assert torch.equal(torch.from_numpy(b), expected)


def test_peft_combines_to_the_same_model(pair, tiny, tmp_path):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    from tests import models

    base = tiny("base", dtype=torch.float32)
    combine(pair, out=tmp_path / "both", weights=[0.5, 2.0])
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(model, pair[0].name, adapter_name="one")
    theirs.load_adapter(pair[1].name, adapter_name="two")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_weighted_adapter(["one", "two"], [0.5, 2.0], "both", combination_type="cat")
    theirs.set_adapter("both")
    expected = models.logits(theirs.eval())
    assert (models.logits(models.load_tuned(base, tmp_path / "both")) - expected).abs().max() < LOGIT_TOLERANCE


def test_a_smaller_rank_costs_what_the_report_says(pair, tmp_path):
    report = combine(pair, out=tmp_path / "cut", how=Exact(rank=2))
    combined = load_patch(tmp_path / "cut")
    for module, delta in combined.deltas.items():
        s = torch.linalg.svdvals(expected_of(pair, module, [1.0, 1.0]))
        assert delta.rank == report.ranks[module] == 2
        assert report.residuals[module] == pytest.approx((s[2:].norm() / s.norm()).item(), rel=1e-3)
    assert combined.record.capture.settings["truncation_residuals"] == report.residuals
    assert min(report.residuals.values()) < report.truncation_residual < max(report.residuals.values())


def test_the_rank_that_loses_nothing_is_found(pair, tmp_path):
    report = combine([pair[1], pair[1]], out=tmp_path / "twice", how=Exact(rank="auto"))
    assert set(report.ranks.values()) == {3}
    assert report.truncation_residual < 1e-6


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_selected_elements_at_full_density_are_what_the_rule_says(pair, tmp_path, method):
    combine(pair, out=tmp_path / method, how=Selected(method, density=1.0, rank=20))
    module = "model.layers.0.self_attn.q_proj"
    first, second = (dense(patch.deltas[module]) for patch in pair)
    total = first + second
    if method == "ties":
        agreeing = [torch.where(part.sign() == total.sign(), part, 0.0) for part in (first, second)]
        total = sum(agreeing) / sum((part != 0).double() for part in agreeing)
    delta = load_patch(tmp_path / method).deltas[module]
    assert torch.allclose(dense(delta), total, atol=1e-4)


def test_a_patch_of_weight_zero_leaves_its_modules_alone(pair, tmp_path):
    report = combine(pair, out=tmp_path / "second", weights=[0.0, 1.0])
    assert set(report.ranks) == set(pair[1].deltas)


def test_the_record_tells_what_went_in(pair, tmp_path):
    report = combine(pair, out=tmp_path / "both", weights=[1.0, 0.25])
    record = load_patch(tmp_path / "both").record
    assert record == report.record
    assert record.base.fingerprint == pair[0].record.base.fingerprint
    assert record.capture.method == "combine"
    inputs = record.capture.settings["inputs"]
    assert [(one["name"], one["weight"]) for one in inputs] == [(pair[0].name, 1.0), (pair[1].name, 0.25)]
    assert inputs[0]["tensors"] != inputs[1]["tensors"]


@pytest.mark.parametrize("how", [Exact(), Exact(rank=3), Selected("dare", 0.5, rank=3, seed=7)])
def test_the_same_patches_give_the_same_bytes(pair, tmp_path, how):
    for name in ("first", "second"):
        combine(pair, out=tmp_path / name, how=how)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_the_combined_patch_ports_and_merges(pair, tiny, tmp_path):
    combine(pair, out=tmp_path / "both")
    evolved = portllm.open_checkpoint(tiny("evolved", of=tiny("base", dtype=torch.float32)))
    ported = portllm.port(load_patch(tmp_path / "both"), evolved=evolved, out=tmp_path / "ported")
    report = portllm.merge(ported, into=evolved, out=tmp_path / "merged")
    assert report.total.kept_gain == pytest.approx(1.0, abs=1e-5)


def test_a_sum_of_ported_patches_has_come_as_far_as_they(pair, tiny, tmp_path):
    base, evolved = tiny("base", dtype=torch.float32), tiny("evolved", of=tiny("base", dtype=torch.float32))
    ported = [portllm.port(patch, base=base, evolved=evolved, out=tmp_path / patch.name[-3:]) for patch in pair]
    report = combine(ported, out=tmp_path / "both")
    assert report.record.ports == ported[0].record.ports


def test_patches_of_other_bases_are_refused_with_the_way_out(pair, tiny, tmp_path):
    other = tiny("base", dtype=torch.float32, seed=5)
    stranger = portllm.capture(
        load_patch(tiny("adapter", of=other)), base=portllm.open_checkpoint(other), out=tmp_path / "other"
    )
    with pytest.raises(PlanRefusedError, match="portllm port"):
        combine([*pair, stranger], out=tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_every_reason_is_given_at_once(pair, tiny):
    adapter = load_patch(tiny("adapter", of=tiny("base", dtype=torch.float32)))
    dense_part = replace(pair[1], values={"model.norm.weight": WholeValue(next(iter(pair[1].deltas.values())).a)})
    plan = plan_combine([pair[0], adapter, dense_part])
    assert ["no patch.json" in refusal.reason or "low-rank deltas" in refusal.reason for refusal in plan.refusals] == [
        True,
        True,
    ]


def test_deltas_of_other_shapes_are_refused(pair):
    module = "model.layers.0.self_attn.q_proj"
    odd = replace(pair[1], name="odd", deltas={module: pair[0].deltas["model.layers.0.mlp.down_proj"]})
    assert [refusal.where for refusal in plan_combine([pair[0], odd]).refusals] == [module]


def test_one_patch_is_nothing_to_combine(pair):
    assert "two or more" in plan_combine(pair[:1]).refusals[0].reason


def test_weights_that_leave_nothing_are_refused(pair):
    assert "would be empty" in plan_combine(pair, weights=[0.0, 0.0]).refusals[0].reason


def test_patches_that_cancel_out_are_no_patch(pair, tmp_path):
    with pytest.raises(PlanRefusedError, match="cancel out"):
        combine([pair[0], pair[0]], out=tmp_path / "none", weights=[1.0, -1.0], how=Exact(rank="auto"))


@pytest.mark.parametrize("weights", [[1.0], [1.0, float("inf")]])
def test_weights_must_be_as_many_finite_numbers(pair, weights):
    with pytest.raises(ValueError, match="weights"):
        plan_combine(pair, weights=weights)


@pytest.mark.parametrize("density", [0.0, 1.5, -0.1])
def test_a_density_is_a_share(density):
    with pytest.raises(ValueError, match="density"):
        Selected("ties", density=density)


def test_a_factor_that_is_not_finite_is_refused(pair, tiny, tmp_path):
    import shutil
    from pathlib import Path

    broken = Path(shutil.copytree(pair[1].name, tmp_path / "broken"))
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="q_proj|up_proj"):
        combine([pair[0], load_patch(broken)], out=tmp_path / "out")


def test_an_output_that_is_there_is_kept(pair, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError):
        combine(pair, out=tmp_path / "out")
