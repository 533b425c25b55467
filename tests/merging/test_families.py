"""Families, end to end: merged bytes equal PEFT's, ported adapters load and compute what the merged model computes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import portllm
from portllm.capturing.adapter import capture_adapter
from portllm.capturing.tuned import capture_tuned
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import PlanRefusedError
from portllm.inspecting.inspect import inspect
from portllm.merging.merge import merge
from portllm.merging.options import MergeOptions
from portllm.merging.plan import plan_merge
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port

KINDS = (
    "llama", "mistral", "gemma2", "gemma3", "qwen2", "qwen3", "phi3", "gpt2", "mixtral", "qwen2-moe", "qwen3-moe",
    "gemma3-vision", "qwen2-vision",
)  # fmt: skip
UNTIED = ("llama", "gpt2", "mixtral", "gemma3-vision", "qwen2-vision")
"""A family of each layout; a head of its own is one more tensor that nothing is done to."""

ALIKE = ("mistral", "gemma2", "qwen2")
"""Families whose modules have the names and the layout of Llama's."""

SPELLED_TWICE = ("mixtral", "gemma3-vision", "qwen2-vision")
F32_LOGITS = 2e-4
"""Logits of size 1 to 10 from weights in float32, once merged and once not: the sums differ in their last bits."""

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of tiny vocabularies and of tied heads


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Base, evolved model and adapter of a kind, each written when first asked for."""
    from tests import families as tiny

    kept = {}

    def make(kind, *, dtype=torch.bfloat16, tied=True, current=False, evolved=False, **lora):
        key = (kind, dtype, tied, current, repr(sorted(lora.items())))
        if key not in kept:
            folder = tmp_path_factory.mktemp(kind)
            how = {"dtype": dtype, "tied": tied, "current": current}
            base = tiny.make_base(kind, folder / "base", **how)
            adapter = tiny.make_adapter(kind, base, folder / "adapter", **lora)
            kept[key] = SimpleNamespace(base=base, evolved=folder / "evolved", adapter=adapter)
        if evolved and not kept[key].evolved.exists():
            tiny.make_base(kind, kept[key].evolved, seed=7, dtype=dtype, tied=tied, current=current)
        return kept[key]

    return make


def tensors_of(folder):
    """Every tensor of a folder by its current name, whichever way it is spelled."""
    stored = load_file(folder / "model.safetensors")
    return {name: stored[info.name] for name, info in open_checkpoint(folder).tensors.items()}


def assert_equal_bytes(ours, theirs):
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(14).reshape(2, 7)).logits.float()


def rename(file, change):
    """Rewrites a file of tensors under other names."""
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def captured(files, folder):
    return capture_adapter(load_patch(files.adapter), base=open_checkpoint(files.base), out=folder)


@pytest.mark.parametrize(("kind", "tied"), [*((kind, True) for kind in KINDS), *((kind, False) for kind in UNTIED)])
def test_captured_and_merged_the_bytes_equal_those_of_peft(kind, tied, made, tmp_path):
    from tests import families as tiny

    files = made(kind, tied=tied)
    patch = captured(files, tmp_path / "patch")
    merge(patch, into=open_checkpoint(files.base), out=tmp_path / "ours")
    tiny.merge_with_peft(kind, files.base, files.adapter, tmp_path / "peft")

    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "peft"))
    assert_equal_bytes(ours, theirs)
    assert any(not torch.equal(tensor, load_file(files.base / "model.safetensors")[n]) for n, tensor in ours.items())


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gemma3-vision"])
def test_in_float32_too(kind, made, tmp_path):
    from tests import families as tiny

    files = made(kind, dtype=torch.float32)
    merge(captured(files, tmp_path / "patch"), into=open_checkpoint(files.base), out=tmp_path / "ours")
    tiny.merge_with_peft(kind, files.base, files.adapter, tmp_path / "peft")
    assert_equal_bytes(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "peft"))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in ALIKE else []) for kind in KINDS]
)
def test_a_ported_adapter_loads_and_computes_what_the_merged_model_computes(kind, made, tmp_path):
    from tests import families as tiny

    files = made(kind, dtype=torch.float32, evolved=True)
    patch = captured(files, tmp_path / "patch")
    ported = port(patch, evolved=open_checkpoint(files.evolved), out=tmp_path / "ported")
    merge(ported, into=open_checkpoint(files.evolved), out=tmp_path / "merged")

    alone = logits(tiny.load(kind, files.evolved))
    with_adapter = logits(tiny.load_tuned(kind, files.evolved, tmp_path / "ported"))
    merged = logits(tiny.load(kind, tmp_path / "merged"))
    assert (with_adapter - merged).abs().max() < F32_LOGITS
    assert (with_adapter - alone).abs().max() > 100 * F32_LOGITS


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_names_the_family_and_its_linear_modules(kind, made):
    from tests import families as tiny

    files = made(kind)
    found = inspect(files.base)
    names = {module.rpartition(" ")[0] for module in found.modules}
    family = open_checkpoint(files.base).family
    assert found.family == family.id == tiny.KINDS[kind].family
    assert {module.rpartition(".")[2] for module in tiny.KINDS[kind].targets} <= names
    assert not names & {"embed_tokens", "wte", "wpe", "gate", "router"}
    assert found.tied_head
    assert found.modules["lm_head 31x12"] == 1


@pytest.mark.parametrize("kind", SPELLED_TWICE)
def test_a_patch_of_one_spelling_is_ported_to_and_merged_into_the_other(kind, made, tmp_path):
    old, new = made(kind, evolved=True), made(kind, current=True, evolved=True)
    assert set(open_checkpoint(old.base).infos) != set(open_checkpoint(new.base).infos)
    patch = captured(old, tmp_path / "patch")
    port(patch, evolved=open_checkpoint(new.evolved), base=open_checkpoint(old.base), out=tmp_path / "ported")
    for name, evolved in (("old", old.evolved), ("new", new.evolved)):
        merge(
            load_patch(tmp_path / "ported"),
            into=open_checkpoint(evolved),
            out=tmp_path / name,
            # Experts of Mixtral are stored apart or together, so no byte is the same.
            options=MergeOptions(allow_other_base=kind == "mixtral"),
        )
        assert set(load_file(tmp_path / name / "model.safetensors")) == set(open_checkpoint(evolved).infos)
    merged = [tensors_of(tmp_path / name) for name in ("old", "new")]
    both = merged[0].keys() & merged[1].keys()
    assert sum("q_proj" in name for name in both) >= 2
    assert_equal_bytes({name: merged[0][name] for name in both}, {name: merged[1][name] for name in both})


@pytest.mark.parametrize("kind", ["gemma3-vision", "qwen2-vision"])
def test_an_adapter_of_transformers_4_is_understood_as_the_one_it_became(kind, made, tmp_path):
    from tests import families as tiny

    files = made(kind)
    old = tmp_path / "adapter"
    old.mkdir()
    for file in files.adapter.iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    prefix = "base_model.model."
    rename(
        old / "adapter_model.safetensors",
        lambda key: prefix + tiny.spelled_of_old(kind, key.removeprefix(prefix)),
    )
    assert set(load_patch(old).deltas) != set(load_patch(files.adapter).deltas)
    for name, adapter in (("old", old), ("new", files.adapter)):
        merge(load_patch(adapter), into=open_checkpoint(files.base), out=tmp_path / name)
    assert_equal_bytes(tensors_of(tmp_path / "old"), tensors_of(tmp_path / "new"))


@pytest.mark.parametrize("kind", ["phi3", "gpt2", "gemma3-vision", "qwen2-vision", "qwen3-moe"])
def test_a_patch_captured_from_two_models_is_loaded_by_peft(kind, made, tmp_path):
    from tests import families as tiny

    files = made(kind, dtype=torch.float32)
    tuned = tiny.merge_with_peft(kind, files.base, files.adapter, tmp_path / "tuned")
    report = capture_tuned(open_checkpoint(files.base), open_checkpoint(tuned), out=tmp_path / "patch")
    assert set(report.deltas) == set(load_patch(files.adapter).deltas)
    found, expected = tiny.load_tuned(kind, files.base, tmp_path / "patch"), tiny.load(kind, tuned)
    assert (logits(found) - logits(expected)).abs().max() < F32_LOGITS


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "mixtral"])
def test_an_adapter_fits_a_checkpoint_that_was_saved_without_its_head(kind, made, tmp_path):
    from tests import families as tiny

    files = made(kind)
    bare = tmp_path / "bare"
    model = tiny.load(kind, files.base)
    getattr(model, model.base_model_prefix).save_pretrained(bare)
    assert not set(open_checkpoint(bare).infos) & set(open_checkpoint(files.base).infos)

    merge(load_patch(files.adapter), into=open_checkpoint(bare), out=tmp_path / "ours")
    merge(load_patch(files.adapter), into=open_checkpoint(files.base), out=tmp_path / "whole")
    assert set(open_checkpoint(tmp_path / "ours").infos) == set(open_checkpoint(bare).infos)
    assert_equal_bytes(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "whole"))


@pytest.mark.parametrize("said", [None, False])
def test_gpt2_stores_its_weights_the_other_way_round_whatever_the_adapter_says(said, made, tmp_path):
    files = made("gpt2")
    config = json.loads((files.adapter / "adapter_config.json").read_text())
    assert config.pop("fan_in_fan_out") is True
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes((files.adapter / "adapter_model.safetensors").read_bytes())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config if said is None else {**config, "fan_in_fan_out": said})
    )
    for name, folder in (("said", files.adapter), ("silent", adapter)):
        merge(load_patch(folder), into=open_checkpoint(files.base), out=tmp_path / name)
    assert_equal_bytes(tensors_of(tmp_path / "silent"), tensors_of(tmp_path / "said"))


def test_gpt2s_head_is_stored_the_usual_way_though_its_layers_are_not(made, tmp_path):
    from tests import families as tiny

    files = made("gpt2", tied=False, target_modules=["c_attn", "lm_head"])
    merge(load_patch(files.adapter), into=open_checkpoint(files.base), out=tmp_path / "ours")
    tiny.merge_with_peft("gpt2", files.base, files.adapter, tmp_path / "peft")
    assert_equal_bytes(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "peft"))


@pytest.mark.parametrize("kind", ["gemma3-vision", "qwen2-vision"])
def test_a_tied_head_of_a_model_of_vision_and_text_is_set_apart_when_it_is_adapted(kind, made, tmp_path):
    from tests import families as tiny

    files = made(kind, dtype=torch.float32, target_modules=["q_proj", "lm_head"])
    merge(load_patch(files.adapter), into=open_checkpoint(files.base), out=tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"].get("tie_word_embeddings", False) is False
    merged, expected = tiny.load(kind, tmp_path / "ours"), tiny.load_tuned(kind, files.base, files.adapter)
    assert (logits(merged) - logits(expected)).abs().max() < F32_LOGITS


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_that_the_model_lacks_is_refused_by_name(kind, made):
    files = made(kind)
    patch = load_patch(files.adapter)
    first = next(iter(patch.deltas))
    moved = replace(patch, deltas={f"elsewhere.{first}": patch.deltas[first]})
    refusals = plan_merge(moved, into=open_checkpoint(files.base)).refusals
    assert f"elsewhere.{first}" in {refusal.where for refusal in refusals}
    assert first in {refusal.where for refusal in refusals}


@pytest.mark.parametrize("kind", ["gemma3-vision", "gpt2", "mixtral"])
def test_a_module_whose_tensors_are_missing_is_named_in_the_adapters_spelling(kind, made):
    files = made(kind)
    patch = load_patch(files.adapter)
    first, *rest = patch.deltas
    lacking = replace(patch, deltas={module: patch.deltas[module] for module in rest})
    with pytest.raises(PlanRefusedError) as caught:
        portllm.merge(lacking, into=open_checkpoint(files.base), out=files.base.parent / "never")
    assert [refusal.where for refusal in caught.value.refusals] == [first]


def test_experts_that_transformers_4_adapted_one_by_one_are_merged_one_by_one(made, tmp_path):
    files = made("qwen3-moe")
    patch = load_patch(files.adapter)
    base = load_file(files.base / "model.safetensors")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    generator = torch.Generator().manual_seed(3)
    factors = load_file(files.adapter / "adapter_model.safetensors")
    experts = [name for name in base if ".experts." in name]
    for name in experts:
        d_out, d_in = base[name].shape
        key = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{key}.lora_A.weight"] = torch.randn(4, d_in, generator=generator)
        factors[f"{key}.lora_B.weight"] = torch.randn(d_out, 4, generator=generator)
    save_file(factors, adapter / "adapter_model.safetensors")
    targets = [*patch.config.fields["target_modules"], "gate_proj", "up_proj", "down_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps({**patch.config.fields, "target_modules": targets}))

    merge(load_patch(adapter), into=open_checkpoint(files.base), out=tmp_path / "ours")
    merged = load_file(tmp_path / "ours" / "model.safetensors")
    for name in experts:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        delta = (factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]) * 1.5
        assert torch.equal(merged[name], (base[name].float() + delta).bfloat16()), name

    fused = plan_merge(load_patch(adapter), into=open_checkpoint(made("qwen3-moe", current=True).base))
    assert {refusal.where for refusal in fused.refusals} == {name.removesuffix(".weight") for name in experts}


def test_an_adapter_of_the_shared_expert_does_not_lack_the_others(made, tmp_path):
    files = made("qwen2-moe", target_modules=["gate_proj", "up_proj", "down_proj"])
    patch = load_patch(files.adapter)
    assert {module.split(".")[4] for module in patch.deltas} == {"shared_expert"}
    assert plan_merge(patch, into=open_checkpoint(files.base)).refusals == ()
