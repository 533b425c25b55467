"""Quantized bases through the pipeline: captured, ported, refused as the place to merge into."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import portllm
from portllm.capturing.adapter import capture_adapter
from portllm.capturing.tuned_plan import plan_capture_tuned
from portllm.checking.update.drift import measure_drift
from portllm.checkpoint.model import identity
from portllm.combining.combine import combine
from portllm.combining.plan import plan_combine
from portllm.errors import PlanRefusedError
from portllm.inspecting.inspect import inspect
from portllm.merging import quantization_gap
from portllm.merging.merge import merge
from portllm.merging.options import MergeOptions
from portllm.merging.plan import plan_merge
from portllm.patch.record import FittedTo, ModelIdentity
from portllm.porting.port import port
from portllm.tensors.tensors import load
from portllm.tensors.windows import load_values
from portllm.verifying.verify import verify
from tests.models import load_tuned, make_adapter
from tests.quantized import quantize_model, write_gguf

SAMPLED = 0.1
"""Double quantization of the sampled blocks' scales alone, instead of all scales."""


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """The tiny base in 16 bit and in NF4, and the evolved model in NF4."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("quantized")
    base = tiny("base", dtype=torch.bfloat16)
    evolved = tiny("evolved", of=base, drift=0.1)
    quantize_model(base, folder / "base", double=True)
    quantize_model(evolved, folder / "evolved", double=True)
    return {"plain": base, "base": folder / "base", "evolved": folder / "evolved"}


@pytest.fixture
def patch(models, tiny, tmp_path):
    """A patch of the base in NF4."""
    adapter = portllm.load_patch(tiny("adapter", of=models["plain"]))
    return capture_adapter(adapter, base=portllm.open_checkpoint(models["base"]), out=tmp_path / "patch")


def test_a_patch_says_that_its_base_is_quantized(patch, models, tmp_path):
    record = json.loads((tmp_path / "patch" / "patch.json").read_text())
    assert patch.record.base.quantization == record["base"]["quantization"] == "nf4-double"
    assert inspect(models["base"]).quantization == "nf4-double"


def test_a_patch_of_the_quantized_base_is_refused_with_the_other_and_the_other_way_round(patch, models, tiny, tmp_path):
    plain, quantized = (portllm.open_checkpoint(models[name]) for name in ("plain", "base"))
    with pytest.raises(PlanRefusedError, match="has the fingerprint"):
        port(patch, base=plain, evolved=portllm.open_checkpoint(models["evolved"]), out=tmp_path / "ported")
    of_plain = capture_adapter(
        portllm.load_patch(tiny("adapter", of=models["plain"])), base=plain, out=tmp_path / "of-plain"
    )
    assert of_plain.record.base.quantization is None
    with pytest.raises(PlanRefusedError, match="has the fingerprint"):
        port(of_plain, base=quantized, evolved=quantized, out=tmp_path / "ported")


def test_a_patch_is_ported_between_quantized_models_with_the_drift_of_their_values(patch, models, tmp_path):
    base, evolved = (portllm.open_checkpoint(models[name]) for name in ("base", "evolved"))
    ported = port(patch, base=base, evolved=evolved, out=tmp_path / "ported")
    step = ported.record.ports[-1]
    assert step.source.quantization == step.target.quantization == "nf4-double"
    drift = measure_drift(base, evolved)
    names = [f"{module}.weight" for module in patch.deltas]
    whole = sum((drift.tensors[name] for name in names[1:]), drift.tensors[names[0]])
    assert step.evidence["sampled_drift"] == pytest.approx(whole.relative, rel=0.01)  # the windows hold all of them


def test_merging_into_quantized_weights_is_refused_with_the_way_out(patch, models, tmp_path):
    with pytest.raises(PlanRefusedError, match="--dtype BF16.*--into MODEL --quantized-base"):
        merge(patch, into=portllm.open_checkpoint(models["base"]), out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_merging_with_a_dtype_stores_what_the_quantized_weights_stand_for(dtype, patch, models, tmp_path):
    quantized = portllm.open_checkpoint(models["base"])
    report = merge(patch, into=quantized, out=tmp_path / "merged", options=MergeOptions(dtype=dtype))
    assert report.quantization is None  # the patch meets the weights that it was fitted to
    assert report.into.digest == identity.digest(quantized)
    plain = tmp_path / "plain"
    shutil.copytree(models["plain"], plain)
    stored = {"BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    save_file(
        {name: load(info).to(stored) for name, info in quantized.infos.items()},
        plain / "model.safetensors",
        metadata={"format": "pt"},
    )
    tuned = load_tuned(plain, tmp_path / "patch", dtype=stored)
    expected = tuned.merge_and_unload().state_dict()
    merged = portllm.open_checkpoint(tmp_path / "merged")
    assert [name for name, info in merged.infos.items() if not load(info).equal(expected[name])] == []
    assert "quantization_config" not in merged.config
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == stored
    assert verify(tmp_path / "merged", base=quantized).verified


def test_a_patch_is_not_taken_from_two_quantized_models(models):
    base, evolved = (portllm.open_checkpoint(models[name]) for name in ("base", "evolved"))
    refused = plan_capture_tuned(base, evolved, rank=None, max_rank=None, dense="keep").refusals
    assert "bitsandbytes nf4-double" in str(refused[0])


def test_an_adapter_is_captured_and_ported_between_gguf_files_without_torch(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=40, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "shape")
    make_adapter(tmp_path / "shape", tmp_path / "adapter")
    weights = write_gguf(tmp_path / "base.gguf", storage="Q4_K")
    write_gguf(tmp_path / "evolved.gguf", storage="Q8_0")
    program = f"""
import sys
from pathlib import Path
import portllm
from portllm.capturing.adapter import capture_adapter
from portllm.merging.plan import plan_merge
from portllm.porting.port import port
from portllm.merging.options import MergeOptions
root = Path({str(tmp_path)!r})
base, evolved = (portllm.open_checkpoint(root / name) for name in ("base.gguf", "evolved.gguf"))
patch = capture_adapter(portllm.load_patch(root / "adapter"), base=base, out=root / "patch")
port(patch, base=base, evolved=evolved, out=root / "ported")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    record = portllm.load_patch(tmp_path / "ported").record
    assert (record.ports[0].source.quantization, record.base.quantization) == ("Q4_K", "Q8_0")
    assert 0 < record.ports[0].evidence["sampled_drift"] < 10
    name = "model.layers.1.self_attn.q_proj.weight"
    found = load_values(portllm.open_checkpoint(tmp_path / "base.gguf").info(name), 300, 2000)
    np.testing.assert_array_equal(found, weights[name].reshape(-1)[300:2000])


def test_an_identity_without_quantization_is_written_as_it_was_before():
    from portllm.files.record import encode
    from portllm.files.typed import decode

    plain = ModelIdentity("m", "s4k1:" + "0" * 40, None)
    assert set(encode(plain)) == {"name", "fingerprint", "digest", "revision"}
    quantized = ModelIdentity("m", "s4k1:" + "0" * 40, None, quantization="Q4_K")
    assert decode(ModelIdentity, encode(quantized)) == quantized


def test_a_qlora_patch_says_what_it_was_fitted_to(models, tiny, tmp_path):
    patch = qlora_patch(models, tiny, tmp_path / "patch")
    assert patch.record.base.quantization is None
    assert patch.record.capture.fitted_to == FittedTo("nf4-double", ("lm_head",))
    base, evolved = portllm.open_checkpoint(models["plain"]), portllm.open_checkpoint(tiny("base", seed=5))
    ported = port(patch, base=base, evolved=evolved, out=tmp_path / "ported")
    assert ported.record.capture.fitted_to == patch.record.capture.fitted_to


def test_check_estimates_the_gap_of_a_qlora_patch_from_samples(models, tiny, tmp_path):
    from portllm.checking.check import check_weights

    patch = qlora_patch(models, tiny, tmp_path / "patch")
    base, evolved = portllm.open_checkpoint(models["plain"]), portllm.open_checkpoint(tiny("base", seed=5))
    found = check_weights(patch, base=base, evolved=evolved).patches[0]
    whole = merge(patch, into=base, out=tmp_path / "merged").quantization.total.ratio
    assert found.quantization.ratio == pytest.approx(whole, rel=SAMPLED)
    assert any("trained on nf4-double weights" in remark for remark in found.verdict.remarks)
    of_plain = capture_adapter(portllm.load_patch(tiny("adapter", of=models["plain"])), base=base, out=tmp_path / "p")
    other = check_weights(of_plain, base=base, evolved=evolved).patches[0]
    assert other.quantization is None
    assert not any("fitted to" in remark for remark in other.verdict.remarks)


def qlora_patch(models, tiny, out, scheme="nf4-double"):
    adapter = portllm.load_patch(tiny("adapter", of=models["plain"]))
    base = portllm.open_checkpoint(models["plain"])
    return capture_adapter(adapter, base=base, out=out, fitted_to=FittedTo(scheme, ("lm_head",)))


def by_torch(models, patch):
    """For each changed weight, `|W - dequant(W4)| / |Δ|` from whole tensors, by bitsandbytes and PEFT's formula."""
    plain, quantized = (portllm.open_checkpoint(models[name]) for name in ("plain", "base"))
    ratios = {}
    for module, delta in patch.deltas.items():
        name = f"{module}.weight"
        gap = load(plain.info(name)).double() - load(quantized.info(name)).double()
        change = (load(delta.b).float() @ load(delta.a).float()).double() * delta.scale
        ratios[name] = (gap.norm() / change.norm()).item()
    return ratios


def test_the_gap_of_a_qlora_patch_is_that_of_bitsandbytes(models, tiny, tmp_path):
    patch = qlora_patch(models, tiny, tmp_path / "patch")
    report = merge(patch, into=portllm.open_checkpoint(models["plain"]), out=tmp_path / "merged")
    gap = report.quantization
    assert {name: sums.ratio for name, sums in gap.tensors.items()} == pytest.approx(by_torch(models, patch), rel=1e-3)
    manifest = json.loads((tmp_path / "merged" / "portllm.json").read_text())["quantization"]
    assert manifest["scheme"] == "nf4-double"
    assert manifest["ratio"] == pytest.approx(gap.total.ratio, rel=1e-5)
    assert manifest["tensors"].keys() == gap.tensors.keys()


def test_a_patch_of_a_quantized_base_is_merged_into_what_that_was_made_from(patch, models, tmp_path):
    plain, quantized = (portllm.open_checkpoint(models[name]) for name in ("plain", "base"))
    with pytest.raises(PlanRefusedError, match="add --quantized-base"):
        merge(patch, into=plain, out=tmp_path / "merged")
    report = merge(patch, into=plain, out=tmp_path / "merged", quantized_base=quantized)
    assert {name: sums.ratio for name, sums in report.quantization.tensors.items()} == pytest.approx(
        by_torch(models, patch), rel=1e-6
    )
    of_plain = merge(
        portllm.load_patch(tmp_path / "patch"),
        into=plain,
        out=tmp_path / "again",
        options=MergeOptions(allow_other_base=True),
    )
    assert of_plain.output.digest == report.output.digest
    assert of_plain.quantization.total.ratio == pytest.approx(report.quantization.total.ratio, rel=1e-3)


def test_the_quantized_base_is_the_one_that_the_patch_belongs_to_and_made_from_the_model(patch, models, tiny, tmp_path):
    plain, quantized, evolved = (portllm.open_checkpoint(models[name]) for name in ("plain", "base", "evolved"))
    stranger = portllm.open_checkpoint(tiny("base", seed=9, dtype=torch.bfloat16))
    for into, given, problem in (
        (plain, plain, "is not quantized"),
        (plain, evolved, "which the patch"),
        (stranger, quantized, "the cosine of their weights is"),
    ):
        assert any(problem in str(refusal) for refusal in plan_merge(patch, into=into, quantized_base=given).refusals)


def test_a_patch_that_was_fitted_to_the_weights_as_they_are_has_no_gap(models, tiny, tmp_path):
    base = portllm.open_checkpoint(models["plain"])
    adapter = portllm.load_patch(tiny("adapter", of=models["plain"]))
    patch = capture_adapter(adapter, base=base, out=tmp_path / "patch")
    report = merge(patch, into=base, out=tmp_path / "merged")
    assert report.quantization is None
    assert "quantization" not in (tmp_path / "merged" / "portllm.json").read_text()


def test_what_was_left_in_16_bit_has_no_gap(models, tiny, tmp_path):
    adapter = portllm.load_patch(tiny("adapter", of=models["plain"]))
    base = portllm.open_checkpoint(models["plain"])
    told = FittedTo("fp4", ("q_proj", "layers.1.mlp.down_proj"))
    patch = capture_adapter(adapter, base=base, out=tmp_path / "patch", fitted_to=told)
    tensors = merge(patch, into=base, out=tmp_path / "merged").quantization.tensors
    changed = {f"{module}.weight" for module in patch.deltas}
    assert changed - set(tensors) == {
        name for name in changed if "q_proj" in name or name == "model.layers.1.mlp.down_proj.weight"
    }


def test_blocks_do_not_change_the_gap(models, tiny, tmp_path, monkeypatch):
    patch = qlora_patch(models, tiny, tmp_path / "patch")
    base = portllm.open_checkpoint(models["plain"])
    whole = merge(patch, into=base, out=tmp_path / "whole").quantization
    monkeypatch.setattr(quantization_gap, "BLOCK_ELEMENTS", 64)
    parts = merge(patch, into=base, out=tmp_path / "parts").quantization
    assert parts.total.ratio == pytest.approx(whole.total.ratio, rel=1e-12)


def test_a_base_that_is_quantized_already_is_not_said_to_be_quantized_again(models, tiny, tmp_path):
    adapter = portllm.load_patch(tiny("adapter", of=models["plain"]))
    with pytest.raises(PlanRefusedError, match="is already quantized"):
        capture_adapter(
            adapter,
            base=portllm.open_checkpoint(models["base"]),
            out=tmp_path / "patch",
            fitted_to=FittedTo("nf4", ()),
        )


def test_patches_that_were_fitted_to_other_weights_are_not_combined(models, tiny, tmp_path):
    one, other = (qlora_patch(models, tiny, tmp_path / name, scheme=name) for name in ("nf4", "fp4"))
    assert "their sum would match neither" in str(plan_combine([one, other]).refusals[0])
    combined = combine([one, one], out=tmp_path / "sum")
    assert combined.record.capture.fitted_to == one.record.capture.fitted_to


def test_a_patch_of_a_gguf_file_is_merged_into_what_it_was_made_from(tmp_path):
    from safetensors.numpy import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = write_gguf(tmp_path / "base.gguf", storage="Q8_0")
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=40, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    make_adapter(tmp_path / "plain", tmp_path / "adapter")
    noise = np.random.default_rng(2)
    plain = {name: (value + noise.normal(scale=0.01, size=value.shape)).astype("f4") for name, value in weights.items()}
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    quantized, into = (portllm.open_checkpoint(tmp_path / name) for name in ("base.gguf", "plain"))
    patch = capture_adapter(portllm.load_patch(tmp_path / "adapter"), base=quantized, out=tmp_path / "patch")
    report = merge(patch, into=into, out=tmp_path / "merged", quantized_base=quantized)
    for name, sums in report.quantization.tensors.items():
        expected = np.square(plain[name].astype("f8") - weights[name].astype("f8")).sum()
        assert sums.gap_sq == pytest.approx(expected, rel=1e-6), name
    ported = port(patch, base=quantized, evolved=into, out=tmp_path / "ported")
    plan = plan_merge(ported, into=into)
    assert plan.fitted is None
    assert any("trained on Q8_0 weights" in note and "the difference is not measured" in note for note in plan.notes)
    assert any(
        "has been ported since" in str(why) for why in plan_merge(ported, into=into, quantized_base=quantized).refusals
    )
