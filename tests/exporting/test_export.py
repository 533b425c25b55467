"""Exports on disk: PEFT's logits, llama.cpp's names and order, mlx-lm's arithmetic, and what is refused."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

import portllm
from portllm.errors import PlanRefusedError
from portllm.exporting.plan import plan_export
from portllm.patch.adapter_folder import load_patch
from portllm.proving.runtimes.table import RUNTIMES
from portllm.serving.runtime import Form, Part, runtimes
from tests import models

LOGIT_TOLERANCE = 1e-5
"""Relative to the largest logit: products are summed in another order."""

ADAPTERS = [name for name, runtime in runtimes().items() if runtime.form is not Form.GGUF_MODEL]
PLAIN = [name for name, runtime in runtimes().items() if runtime.form is Form.LORA]
RECIPES = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 9}},
    "some layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "a regex": {"target_modules": r".*\.0\..*(k|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.fixture(scope="module")
def base(tiny):
    return tiny("base", dtype=torch.float32)


def exported(patch, runtime, base, out, **how):
    return portllm.export(patch, runtime=runtime, base=base, out=out, **how)


def close(found, expected):
    return (found - expected).abs().max() < LOGIT_TOLERANCE * expected.abs().max()


EACH_RECIPE_ONCE = [("vllm", recipe) for recipe in RECIPES]
EACH_RUNTIME_ONCE = [(runtime, "patterns") for runtime in ("peft", *PLAIN) if runtime != "vllm"]


@pytest.mark.parametrize(("runtime", "recipe"), EACH_RECIPE_ONCE + EACH_RUNTIME_ONCE)
def test_peft_gives_the_logits_of_the_patch(tiny, base, tmp_path, runtime, recipe):
    adapter = tiny("adapter", of=base, **RECIPES[recipe])
    exported(adapter, runtime, base, tmp_path / "out")
    found = models.logits(models.load_tuned(base, tmp_path / "out"))
    assert close(found, models.logits(models.load_tuned(base, adapter)))


@pytest.mark.parametrize("runtime", PLAIN)
def test_the_plain_form_says_nothing_that_a_runtime_could_overlook(tiny, base, tmp_path, runtime):
    adapter = tiny("adapter", of=base, use_rslora=True, rank_pattern={"q_proj": 2}, layers_to_transform=[1])
    done = exported(adapter, runtime, base, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == done.record.rank
    assert not any(config[field] for field in ("rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save"))
    assert config["target_modules"] == sorted(models.SEVEN)
    assert config["init_lora_weights"] is True
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(models.SEVEN) * models.LAYERS
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {config["r"]}
    assert all(re.fullmatch(r"base_model\.model\.model\.layers\.\d+\..*\.lora_[AB]\.weight", name) for name in tensors)


@pytest.mark.parametrize(("runtime", "rank"), [("vllm", 8), ("sglang", 4), ("mistralrs", 4)])
def test_the_rank_is_one_that_the_runtime_takes(tiny, base, tmp_path, runtime, rank):
    assert exported(tiny("adapter", of=base), runtime, base, tmp_path / "out").record.rank == rank


def test_a_module_that_must_stand_beside_another_is_there_as_zeros(tiny, base, tmp_path):
    adapter = tiny("adapter", of=base, target_modules=["q_proj"])
    exported(adapter, "sglang", base, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"
    assert tensors[key.format("A")].shape == (4, models.HIDDEN)
    assert not tensors[key.format("B")].any()


def test_the_file_alone_holds_what_the_folder_does(tiny, base, tmp_path):
    adapter = tiny("adapter", of=base)
    alone = exported(adapter, "openvino", base, tmp_path / "file")
    folder = exported(adapter, "mistralrs", base, tmp_path / "folder")
    assert alone.given.read_bytes() == (folder.folder / "adapter_model.safetensors").read_bytes()
    assert alone.given.stem == alone.record.name


def dense(patch):
    from portllm.tensors.tensors import load

    deltas = load_patch(patch).deltas
    return {module: delta.scale * load(delta.b).double() @ load(delta.a).double() for module, delta in deltas.items()}


def test_llama_cpp_gets_its_names_and_its_order_of_rows(tiny, base, tmp_path):
    adapter = tiny("adapter", of=base, use_rslora=True, rank_pattern={"k_proj": 2})
    done = exported(adapter, "llamacpp", base, tmp_path / "out")
    reader = GGUFReader(done.given)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    factors = {tensor.name: torch.from_numpy(np.array(tensor.data)).double() for tensor in reader.tensors}
    scale = fields["adapter.lora.alpha"] / done.record.rank
    expected = dense(adapter)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.down_proj": "ffn_down"}
    for module, stored in names.items():
        name = f"blk.1.{stored}.weight"
        delta = scale * factors[f"{name}.lora_b"] @ factors[f"{name}.lora_a"]
        whole = expected[f"model.layers.1.{module}"]
        heads = {"attn_q": models.HEADS, "attn_k": models.KEY_HEADS}.get(stored)
        if heads:  # llama.cpp's own `permute`, written out
            whole = whole.reshape(heads, 2, len(whole) // heads // 2, -1).swapaxes(1, 2).reshape(whole.shape)
        assert torch.allclose(delta, whole, rtol=1e-5, atol=1e-6), name
    assert len(factors) == 2 * len(expected)


def test_mlx_gets_its_names_and_transposes(tiny, base, tmp_path):
    adapter = tiny("adapter", of=base, use_rslora=True)
    exported(adapter, "mlx", base, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["num_layers"] == models.LAYERS
    assert config["lora_parameters"]["keys"][0] == "mlp.down_proj"
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    scale = config["lora_parameters"]["scale"]
    for module, delta in dense(adapter).items():
        a, b = (tensors[f"{module}.{name}"].double() for name in ("lora_a", "lora_b"))
        assert a.shape == (delta.shape[1], config["lora_parameters"]["rank"])
        assert torch.allclose(scale * (a @ b).T, delta, rtol=1e-5, atol=1e-6), module


@pytest.mark.parametrize("runtime", [name for name in ADAPTERS if name != "peft"])
def test_everything_that_a_runtime_has_no_place_for_is_named_at_once(tiny, tmp_path, runtime):
    of = tiny("base", tied=False, attention_bias=True, dtype=torch.float32)
    adapter = tiny(
        "adapter", of=of, use_dora=True, bias="all", modules_to_save=["norm"], target_modules=["q_proj", "lm_head"]
    )
    with pytest.raises(PlanRefusedError) as refused:
        exported(adapter, runtime, of, tmp_path / "out")
    said = str(refused.value)
    for part in ("DoRA", "whole modules", "biases", "head"):
        assert f"takes no {part}" in said, part
    assert f"portllm merge {adapter} --into {of} -o MODEL" in said
    assert not (tmp_path / "out").exists()


def test_peft_gets_what_only_peft_takes(tiny, tmp_path):
    of = tiny("base", tied=False, dtype=torch.float32)
    adapter = tiny("adapter", of=of, use_dora=True, modules_to_save=["lm_head"])
    exported(adapter, "peft", of, tmp_path / "out")
    found = models.logits(models.load_tuned(of, tmp_path / "out"))
    assert torch.equal(found, models.logits(models.load_tuned(of, adapter)))


@pytest.mark.filterwarnings("ignore")  # peft warns of an embedding that it saves
def test_added_tokens_are_no_wrong_shape(tiny, tmp_path):
    of = tiny("base", tied=False, dtype=torch.float32)
    wide = models.resized(of, models.VOCABULARY + 2)
    adapter, _ = models.adapter_of(wide, tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    entries = [{"id": models.VOCABULARY + number, "content": token} for number, token in enumerate("ab")]
    (adapter / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"t": 0}}, "added_tokens": entries}))
    patch = portllm.capture(adapter, base=of, out=tmp_path / "patch")
    exported(patch, "peft", of, tmp_path / "out")
    with pytest.raises(PlanRefusedError, match="takes no whole modules") as refused:
        exported(patch, "vllm", of, tmp_path / "other")
    assert "shapes must be equal" not in str(refused.value)


def test_the_model_is_asked_for_only_where_it_matters(tiny, base):
    takes = runtimes()["mistralrs"]
    whole = load_patch(tiny("adapter", of=base))
    assert not plan_export(whole, takes).refusals
    part = load_patch(tiny("adapter", of=base, layers_to_transform=[0]))
    assert [refusal.where for refusal in plan_export(part, takes).refusals] == ["--base"]
    assert [refusal.where for refusal in plan_export(whole, runtimes()["llamacpp"]).refusals] == ["--base"]


def test_only_the_layers_of_the_patch_go_where_the_others_are_not_needed(tiny, base, tmp_path):
    adapter = tiny("adapter", of=base, layers_to_transform=[1], target_modules=["q_proj"])
    exported(adapter, "openvino", None, tmp_path / "file")
    names = load_file(next((tmp_path / "file").glob("*.safetensors")))
    assert {name.split(".")[4] for name in names} == {"1"}


def test_a_model_whose_names_in_mlx_are_not_known_is_refused(tiny, tmp_path):
    of = models.make_base(tmp_path / "gpt2", kind="gpt2")
    adapter = models.make_adapter(of, tmp_path / "adapter", target_modules=["c_fc"], fan_in_fan_out=True)
    with pytest.raises(PlanRefusedError, match="takes no Conv1D"):
        exported(adapter, "mlx", of, tmp_path / "out")


def test_another_base_is_refused(tiny, base, tmp_path):
    patch = portllm.capture(tiny("adapter", of=base), base=base, out=tmp_path / "patch")
    with pytest.raises(PlanRefusedError, match="belongs to"):
        exported(patch, "vllm", tiny("evolved", of=base), tmp_path / "out")


def test_the_name_changes_with_the_port_and_with_nothing_else(tiny, base, tmp_path):
    patch = portllm.capture(tiny("adapter", of=base), base=base, out=tmp_path / "patch")
    ported = portllm.port(patch, evolved=tiny("evolved", of=base), out=tmp_path / "new" / "patch")
    names = [
        exported(patch, "vllm", None, tmp_path / "a").record.name,
        exported(patch, "vllm", base, tmp_path / "b").record.name,
        exported(ported, "vllm", None, tmp_path / "c").record.name,
    ]
    assert names[0] == names[1] != names[2]
    assert all(re.fullmatch(r"patch-[0-9a-f]{8}", name) for name in names)


def test_the_same_export_is_the_same_bytes(tiny, base, tmp_path):
    for runtime in ADAPTERS:
        folders = [exported(tiny("adapter", of=base), runtime, base, tmp_path / f"{runtime}{n}").folder for n in "12"]
        first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
        assert first == second


def test_a_rank_that_is_too_large_is_refused(tiny, base, tmp_path):
    adapter = tiny("adapter", of=base, r=300, target_modules=["q_proj"])
    with pytest.raises(PlanRefusedError, match="largest rank is 300; mistral.rs takes up to 256"):
        exported(adapter, "mistralrs", base, tmp_path / "out")


def test_the_command_exports_and_says_how_to_serve(portllm, tiny, base, tmp_path):
    done = portllm("export", tiny("adapter", of=base), "--for", "vllm", "--base", base, "-o", tmp_path / "out")
    assert done.status == 0, done.err
    assert f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules" in done.out
    planned = portllm("export", tiny("adapter", of=base), "--for", "mlx", "-o", tmp_path / "not", "--dry-run")
    assert planned.status == 0
    assert not (tmp_path / "not").exists()
    as_json = portllm("export", tiny("adapter", of=base), "--for", "mlx", "-o", tmp_path / "json", "--json")
    assert json.loads(as_json.out)["record"]["runtime"] == "mlx"
    unknown = portllm("export", tiny("adapter", of=base), "--for", "abacus", "-o", tmp_path / "not")
    assert (unknown.status, "expected one of peft, vllm" in unknown.err) == (1, True)


def test_what_prove_starts_for_an_export_is_a_runtime_that_takes_its_form():
    for runtime in runtimes().values():
        if runtime.prove and runtime.form is not Form.GGUF_MODEL:
            assert RUNTIMES[runtime.prove].profile == runtime.id
    assert {row.profile for row in RUNTIMES.values()} <= {row.id for row in runtimes().values() if row.prove}


def test_an_export_says_how_to_prove_it(tiny, tmp_path):
    done = portllm.export(tiny("adapter"), runtime="vllm", base=tiny("base"), out=tmp_path / "out")
    words = shlex.split(done.prove)
    assert words[:3] == ["portllm", "prove", str(tiny("adapter"))]
    assert words[3:] == ["--base", str(tiny("base")), "--runtime", "vllm", "--export", str(tmp_path / "out")]
    assert portllm.export(tiny("adapter"), runtime="tgi", base=tiny("base"), out=tmp_path / "tgi").prove is None


def test_what_a_runtime_does_with_what_it_does_not_take_is_said(tiny, tmp_path):
    adapter = tiny("adapter", of=tiny("base", tied=False), target_modules=["q_proj", "lm_head"])
    with pytest.raises(PlanRefusedError, match=re.escape(runtimes()["mistralrs"].why[Part.HEAD])):
        portllm.export(adapter, runtime="mistralrs", base=tiny("base", tied=False), out=tmp_path / "out")
    assert not any(runtime.holds & set(runtime.why) for runtime in runtimes().values())
