"""Exports as GGUF: adapters of each architecture, and merged files with PEFT's bytes in llama.cpp's order."""

import json
import shutil

import numpy as np
import pytest
import torch
from gguf import GGUFReader, LlamaFileType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import portllm
from portllm.checkpoint.gguf.tensors import architectures
from portllm.errors import PlanRefusedError
from portllm.tensors.tensors import load
from tests import models
from tests.quantized import SIZES, write_gguf
from tests.tiny_gguf import convert_llama

F16_UNIT_ROUNDOFF = 2**-11


def tensors_of(file):
    return {tensor.name: bytes(np.array(tensor.data).tobytes()) for tensor in GGUFReader(file).tensors}


@pytest.mark.parametrize("recipe", [{}, {"use_dora": True}, {"modules_to_save": ["post_attention_layernorm"]}])
def test_the_merged_file_has_pefts_bytes_in_the_order_of_llama_cpp(tiny, tmp_path, recipe):
    base = tiny("base")
    patch = portllm.capture(tiny("adapter", of=base, **recipe), base=base, out=tmp_path / "patch")
    file = convert_llama(base, tmp_path / "base.gguf")
    done = portllm.export(patch, runtime="ollama", base=file, out=tmp_path / "out")
    merged = models.merge_with_peft(base, tmp_path / "patch", tmp_path / "merged")
    assert tensors_of(done.given) == tensors_of(convert_llama(merged, tmp_path / "merged.gguf"))
    assert tensors_of(done.given) != tensors_of(file)
    assert (tmp_path / "out" / "Modelfile").read_text() == f"FROM ./{done.record.name}.gguf\n"
    assert 0.9 < done.record.kept_gain <= 1.1


def make_adapter(folder, factors, values):
    """An adapter as PEFT lays it out, for models that no class here has."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": sorted(factors)}
    config["modules_to_save"] = [name.removesuffix(".weight") for name in values] or None
    (folder / "adapter_config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(5)
    tensors = {f"base_model.model.{name}": values[name] for name in values}
    for module, (d_out, d_in) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(3, d_in, generator=draw) / 4
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(d_out, 3, generator=draw) / 4
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def delta_of(adapter, module):
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{factor}.weight"].double() for factor in "AB")
    return 2 * b @ a


@pytest.fixture(scope="module", params=sorted(architectures()))
def of_architecture(request, tmp_path_factory):
    """A GGUF file in f16, its weights as transformers has them, and an adapter of some of them."""
    folder = tmp_path_factory.mktemp(request.param)
    weights = write_gguf(folder / "base.gguf", request.param, storage="F16")
    matrices = {name.removesuffix(".weight"): weight.shape for name, weight in weights.items() if weight.ndim == 2}
    factors = {module: shape for module, shape in matrices.items() if ".layers." in module}
    values = {"model.norm.weight": torch.linspace(0.5, 2.0, SIZES["hidden"])}
    return {
        "base": folder / "base.gguf",
        "weights": weights,
        "plain": make_adapter(folder / "plain", factors, {}),
        "whole": make_adapter(folder / "whole", factors, values),
        "values": values,
    }


def test_a_merged_file_of_each_architecture_is_the_sum(of_architecture, tmp_path):
    adapter = of_architecture["whole"]
    done = portllm.export(adapter, runtime="ollama", base=of_architecture["base"], out=tmp_path / "out")
    merged = portllm.open_checkpoint(done.given)
    for name, weight in of_architecture["weights"].items():
        found = load(merged.infos[name]).double()
        expected = torch.from_numpy(np.array(weight)).double()
        if name in of_architecture["values"]:
            expected = of_architecture["values"][name].double()
        elif ".layers." in name and weight.ndim == 2:
            expected = expected + delta_of(adapter, name.removesuffix(".weight"))
        assert torch.allclose(found, expected, rtol=2 * F16_UNIT_ROUNDOFF, atol=1e-5), name


def test_an_adapter_of_each_architecture_is_the_delta_of_the_file(of_architecture, tmp_path):
    adapter = of_architecture["plain"]
    done = portllm.export(adapter, runtime="llamacpp", base=of_architecture["base"], out=tmp_path / "out")
    stored = {tensor.name: tensor for tensor in GGUFReader(of_architecture["base"]).tensors}
    factors = {t.name: torch.from_numpy(np.array(t.data)).double() for t in GGUFReader(done.given).tensors}
    merged = portllm.export(adapter, runtime="ollama", base=of_architecture["base"], out=tmp_path / "merged")
    sums = {tensor.name: np.array(tensor.data).astype(np.float64) for tensor in GGUFReader(merged.given).tensors}
    names = {name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")}
    for name in names:
        delta = factors[f"{name}.lora_b"] @ factors[f"{name}.lora_a"]
        exact = np.array(stored[name].data).astype(np.float64) + delta.numpy()
        assert np.allclose(sums[name], exact, rtol=2 * F16_UNIT_ROUNDOFF, atol=1e-4), name
    assert len(names) == len(load_file(adapter / "adapter_model.safetensors")) // 2


def test_a_quantized_file_says_which_one_to_merge_into(tiny, tmp_path):
    weights = write_gguf(tmp_path / "base.gguf", "llama", storage="Q8_0")
    module = "model.layers.0.mlp.up_proj"
    adapter = make_adapter(tmp_path / "adapter", {module: weights[f"{module}.weight"].shape}, {})
    with pytest.raises(PlanRefusedError, match=r"up_proj.weight \(Q8_0\): quantized in .*llama-quantize"):
        portllm.export(adapter, runtime="ollama", base=tmp_path / "base.gguf", out=tmp_path / "out")
    portllm.export(adapter, runtime="llamacpp", base=tmp_path / "base.gguf", out=tmp_path / "lora")


def test_a_folder_alone_cannot_be_merged_into_as_gguf_and_the_way_is_said(tiny, tmp_path):
    with pytest.raises(PlanRefusedError, match=r"no GGUF file.*--gguf OLD.gguf"):
        portllm.export(tiny("adapter"), runtime="ollama", base=tiny("base"), out=tmp_path / "out")


def test_a_tied_head_is_not_changed_behind_the_embedding(tiny, tmp_path):
    base = tiny("base")
    adapter = make_adapter(tmp_path / "adapter", {"lm_head": (models.VOCABULARY, models.HIDDEN)}, {})
    file = convert_llama(base, tmp_path / "base.gguf")
    with pytest.raises(PlanRefusedError, match="one matrix"):
        portllm.export(adapter, runtime="ollama", base=file, out=tmp_path / "out")


def test_the_file_of_another_model_is_refused(tiny, tmp_path):
    patch = portllm.capture(tiny("adapter"), base=tiny("base"), out=tmp_path / "patch")
    file = convert_llama(tiny("evolved"), tmp_path / "evolved.gguf")
    with pytest.raises(PlanRefusedError, match="belongs to"):
        portllm.export(patch, runtime="ollama", base=file, out=tmp_path / "out")


TOKENS = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd"]
MERGES = ["a b", "c d"]
OF_OLD = {
    "general.name": "old",
    "general.file_type": 15,
    "llama.context_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": models.HEAD_DIM,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 28,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": "old",
}
"""What the file of an older version says, whose end of text was another token."""

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": row, "content": TOKENS[row], "special": True} for row in range(3)],
    "model": {
        "type": "BPE",
        "vocab": {token: row for row, token in enumerate(TOKENS)},
        "merges": [merge.split() for merge in MERGES],
    },
}


def with_tokenizer(base, folder, *, config=None, tokenizer=TOKENIZER):
    """A copy of a tiny model with a tokenizer."""
    shutil.copytree(base, folder)
    said = json.loads((base / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    (folder / "chat_template.jinja").write_text("new")
    return folder


def old_file(tiny, file, changed=None):
    """The GGUF file of the model that the tiny one evolved from."""
    return convert_llama(tiny("evolved"), file, OF_OLD | (changed or {}))


@pytest.mark.parametrize("recipe", [{}, {"use_dora": True}, {"modules_to_save": ["post_attention_layernorm"]}])
def test_a_merged_file_is_made_of_safetensors_as_the_converter_makes_it(tiny, tmp_path, recipe):
    base = with_tokenizer(tiny("base"), tmp_path / "base")
    adapter = tiny("adapter", of=tiny("base"), **recipe)
    old = old_file(tiny, tmp_path / "old.gguf")

    done = portllm.export(adapter, runtime="ollama", base=base, gguf=old, out=tmp_path / "out")

    merged = models.merge_with_peft(base, adapter, tmp_path / "merged")
    assert tensors_of(done.given) == tensors_of(convert_llama(merged, tmp_path / "merged.gguf"))
    said = {key: field.contents() for key, field in GGUFReader(done.given).fields.items()}
    own = {
        "general.name": done.record.name,
        "general.file_type": LlamaFileType.MOSTLY_BF16,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "new",
    }
    epsilon = "llama.attention.layer_norm_rms_epsilon"
    expected = {**OF_OLD, **own, epsilon: np.float32(OF_OLD[epsilon])}
    assert {key: said.get(key) for key in expected} == expected


def test_the_file_is_what_transformers_loads_as_the_merged_model(tiny, tmp_path):
    base = with_tokenizer(tiny("base"), tmp_path / "base")
    adapter, ids = tiny("adapter", of=tiny("base")), torch.arange(3, 12)[None]
    old = old_file(tiny, tmp_path / "old.gguf")

    done = portllm.export(adapter, runtime="ollama", base=base, gguf=old, out=tmp_path / "out", dtype="float32")

    with torch.no_grad():
        expected = models.load_tuned(base, adapter, dtype=torch.float32)(ids).logits
        loaded = AutoModelForCausalLM.from_pretrained(done.folder, gguf_file=done.given.name, dtype=torch.float32)
        found = loaded(ids).logits
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "file", "said"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {}, "rope.freq_base' is 10000.0.*500000.0"),
        ({"rms_norm_eps": 1e-5}, {}, "layer_norm_rms_epsilon"),
        ({"max_position_embeddings": 128}, {}, "context_length' is 64, and would be 128"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}}, {}, "scaling.type' is missing"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
            {},
            "rope_freqs.weight' is missing, which llama3 needs",
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, {}, "rope_freqs.weight' is missing, which llama3 needs"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, {}, "rotary scaling 'dynamic' is not known"),
        ({}, {"llama.expert_count": 4}, "expert_count' is not known here"),
        ({}, {"llama.final_logit_softcapping": 30.0}, "softcapping' is 30.0, and config.json says nothing of it"),
        ({}, {"llama.attention.sliding_window": 8}, "sliding_window' is 8, and config.json says nothing of it"),
        ({}, {"llama.attention.key_length": None}, "key_length' is missing, and would be 6"),
        ({}, {"tokenizer.ggml.tokens": [*TOKENS[:30], "xy"]}, "token 30 is 'xy', and would be 'cd'"),
        ({}, {"tokenizer.ggml.tokens": TOKENS[:30]}, "30 tokens, the embedding 31 rows"),
        ({}, {"tokenizer.ggml.merges": MERGES[::-1]}, "merges are other ones"),
    ],
)  # fmt: skip
def test_a_template_that_says_something_else_of_the_model_is_refused(tiny, tmp_path, config, file, said):
    base = with_tokenizer(tiny("base"), tmp_path / "base", config=config)
    old = old_file(tiny, tmp_path / "old.gguf", file)
    with pytest.raises(PlanRefusedError, match=said):
        portllm.export(tiny("adapter"), runtime="ollama", base=base, gguf=old, out=tmp_path / "out")


def test_the_factors_of_llama3_are_those_of_transformers(tiny, tmp_path):
    rope = {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 300}  # fmt: skip
    base = with_tokenizer(tiny("base"), tmp_path / "base", config={"rope_parameters": rope})
    config = LlamaConfig.from_pretrained(base)
    turned, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1e4 ** (-torch.arange(0, models.HEAD_DIM, 2) / models.HEAD_DIM)
    factors = (plain / turned).numpy().astype(np.float32)
    assert len(set(factors.round(3))) == models.HEAD_DIM // 2
    file = old_file(tiny, tmp_path / "old.gguf", {"rope_freqs": factors})

    done = portllm.export(tiny("adapter"), runtime="ollama", base=base, gguf=file, out=tmp_path / "out")

    assert tensors_of(done.given)["rope_freqs.weight"] == factors.tobytes()
    wrong = old_file(tiny, tmp_path / "wrong.gguf", {"rope_freqs": factors * 2})
    with pytest.raises(PlanRefusedError, match="rope_freqs.weight' has other values"):
        portllm.export(tiny("adapter"), runtime="ollama", base=base, gguf=wrong, out=tmp_path / "wrong")


def test_a_patch_of_a_tied_head_gets_a_head_of_its_own_in_a_file_that_is_made(tiny, tmp_path):
    base = with_tokenizer(tiny("base"), tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", {"lm_head": (models.VOCABULARY, models.HIDDEN)}, {})
    old = old_file(tiny, tmp_path / "old.gguf")

    done = portllm.export(adapter, runtime="ollama", base=base, gguf=old, out=tmp_path / "out", dtype="float32")

    made = portllm.open_checkpoint(done.given)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"].double()
    expected = embedding + delta_of(adapter, "lm_head")
    assert torch.allclose(load(made.infos["lm_head.weight"]).double(), expected, atol=1e-6)
    assert torch.equal(load(made.infos["model.embed_tokens.weight"]).double(), embedding)


@pytest.mark.parametrize(
    ("runtime", "base", "options", "said"),
    [
        ("vllm", "folder", {}, "is for a merged GGUF file"),
        ("ollama", "file", {}, "is for a model in safetensors"),
        ("ollama", "file alone", {"dtype": "float16"}, "keeps the types of its tensors"),
    ],
)
def test_options_of_a_merged_file_are_refused_where_they_do_nothing(tiny, tmp_path, runtime, base, options, said):
    folder = with_tokenizer(tiny("base"), tmp_path / "base")
    file = old_file(tiny, tmp_path / "old.gguf")
    with pytest.raises(PlanRefusedError, match=said):
        portllm.export(
            tiny("adapter"),
            runtime=runtime,
            base=folder if base == "folder" else file,
            gguf=None if base == "file alone" else file,
            out=tmp_path / "out",
            **options,
        )
