"""Quantized bases through the pipeline: captured, ported, refused as the place to merge into."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import portllm
from portllm.checkpoint.sample import load_values
from portllm.errors import PlanRefusedError
from portllm.patch.record import ModelIdentity
from portllm.pipeline.capture import capture_adapter
from portllm.pipeline.drift import measure_drift
from portllm.pipeline.inspect import inspect
from portllm.pipeline.merge import merge
from portllm.pipeline.port import port
from portllm.pipeline.tuned_plan import plan_capture_tuned
from tests.models import make_adapter
from tests.quantized import quantize_model, write_gguf


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
    with pytest.raises(PlanRefusedError, match="Give the 16-bit model"):
        merge(patch, into=portllm.open_checkpoint(models["base"]), out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


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
from portllm.pipeline.capture import capture_adapter
from portllm.pipeline.port import port
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
    from portllm.patch.record import identity_from_json, identity_to_json

    plain = ModelIdentity("m", "s4k1:" + "0" * 40)
    assert set(identity_to_json(plain)) == {"name", "fingerprint", "digest", "revision"}
    quantized = ModelIdentity("m", "s4k1:" + "0" * 40, quantization="Q4_K")
    assert identity_from_json(identity_to_json(quantized)) == quantized
