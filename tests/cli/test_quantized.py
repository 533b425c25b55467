"""Quantized models on the command line: what a QLoRA patch was fitted to, and bases that are quantized themselves."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import make_adapter, make_base, make_evolved, merge_with_peft
from tests.quantized import CONFIGS, quantize_mlp


def test_what_a_patch_was_fitted_to_is_recorded_shown_and_measured(portllm, tiny, tmp_path):
    base = tiny("base", dtype=torch.bfloat16)
    adapter, patch = tiny("adapter", of=base), tmp_path / "patch"
    done = portllm("capture", "--adapter", adapter, "--base", base, "--fitted-to", "nf4-double", "-o", patch)
    assert done.status == 0
    assert "fitted to  the base quantized to nf4-double, except lm_head" in done.out
    record = json.loads((patch / "patch.json").read_text())
    assert record["capture"]["fitted_to"] == {"scheme": "nf4-double", "left_alone": ["lm_head"]}
    assert "trained on nf4-double weights" in portllm("merge", patch, "--into", base, "-o", "x", "--dry-run").out
    done = portllm("merge", patch, "--into", base, "-o", tmp_path / "merged", "--json")
    told = json.loads(done.out)["quantization"]
    assert told["scheme"] == "nf4-double"
    assert told["ratio"] > 0
    shown = portllm("merge", patch, "--into", base, "-o", tmp_path / "merged", "--overwrite").out
    assert f"nf4-double is {told['ratio']:.3g} times the patch" in shown
    assert ("The merge adds back far more" in shown) == (told["ratio"] >= 10)


def test_a_small_patch_is_warned_of(portllm, tiny, tmp_path):
    base = tiny("base", dtype=torch.bfloat16)
    adapter = tiny("adapter", of=base, lora_alpha=0.01)
    portllm("capture", "--adapter", adapter, "--base", base, "--fitted-to", "fp4", "-o", tmp_path / "patch")
    shown = portllm("merge", tmp_path / "patch", "--into", base, "-o", tmp_path / "merged").out
    assert "The merge adds back far more quantization error than patch" in shown


def test_options_that_do_not_go_together_are_wrong_usage(portllm, tmp_path):
    capture = ("capture", "--base", "b", "-o", tmp_path / "patch")
    assert portllm(*capture, "--adapter", "a", "--left-alone", "lm_head").status == 2
    assert portllm(*capture, "--tuned", "t", "--fitted-to", "nf4").status == 2


@pytest.fixture(scope="module", params=CONFIGS)
def stored(request, tmp_path_factory):
    """Base and evolved model whose MLPs are quantized, and the values of both."""
    folder = tmp_path_factory.mktemp(request.param)
    base = make_base(folder / "plain", hidden=48, inner=80, dtype=torch.float32)
    evolved = make_evolved(base, folder / "plain-2", drift=0.05)
    return [quantize_mlp(model, folder / name, request.param) for model, name in ((base, "base"), (evolved, "evolved"))]


def test_a_patch_of_quantized_modules_is_captured_ported_and_merged_as_one_of_their_values(portllm, stored, tmp_path):
    (base, values), (evolved, evolved_values) = stored
    adapter = make_adapter(values, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    assert portllm("capture", "--adapter", adapter, "--base", base, "-o", tmp_path / "patch").status == 0
    assert json.loads((tmp_path / "patch" / "patch.json").read_text())["base"]["quantization"]
    ported = tmp_path / "ported"
    assert portllm("port", tmp_path / "patch", "--base", base, "--evolved", evolved, "-o", ported).status == 0
    assert (
        load_file(ported / "adapter_model.safetensors").keys()
        == load_file(adapter / "adapter_model.safetensors").keys()
    )
    done = portllm("merge", ported, "--into", evolved, "--dtype", "F32", "-o", tmp_path / "merged")
    assert done.status == 0, done.err
    expected = merge_with_peft(evolved_values, adapter, tmp_path / "expected")
    merged, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", expected))
    assert merged.keys() == theirs.keys()
    assert all(torch.allclose(merged[name], theirs[name].float(), atol=1e-6) for name in theirs if ".mlp." in name)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_the_drift_is_that_of_the_values_and_no_scale_is_a_weight(portllm, stored, tmp_path):
    (base, values), (evolved, evolved_values) = stored
    adapter = make_adapter(values, tmp_path / "adapter", target_modules=["down_proj"])
    for how in ((), ("--full",)):
        told = [
            json.loads(portllm("check", adapter, "--base", old, "--evolved", new, "--json", *how).out)["update"]
            for old, new in ((base, evolved), (values, evolved_values))
        ]
        assert told[0]["kinds"].keys() == told[1]["kinds"].keys()
        for kind, drift in told[0]["kinds"].items():
            assert drift["relative"]["value"] == pytest.approx(told[1]["kinds"][kind]["relative"]["value"], rel=1e-5)


def test_modules_that_are_not_quantized_are_merged_into_and_the_others_stay_as_they_are(portllm, stored, tmp_path):
    (base, values), _ = stored
    adapter = make_adapter(values, tmp_path / "adapter", target_modules=["q_proj"])
    done = portllm("merge", adapter, "--into", base, "-o", tmp_path / "merged")
    assert done.status == 0, done.err
    assert "what the patch does not change stays quantized" in done.out
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].view(torch.uint8).ne(after[name].view(torch.uint8)).any()}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert portllm("verify", tmp_path / "merged").status == 0
    in_place = shutil.copytree(base, tmp_path / "in-place")
    assert portllm("merge", adapter, "--into", in_place, "--in-place").status == 0
    again = load_file(in_place / "model.safetensors")
    assert all(torch.equal(again[name].view(torch.uint8), after[name].view(torch.uint8)) for name in after)
    assert portllm("merge", "--undo", in_place).status == 0


def test_a_sum_is_not_quantized_again(portllm, stored, tmp_path):
    (base, values), _ = stored
    adapter = make_adapter(values, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    for how in (("-o", tmp_path / "merged"), ("--in-place",)):
        done = portllm("merge", adapter, "--into", base, *how)
        assert done.status == 1
        assert "down_proj" in done.err
        assert "--dtype BF16" in done.err


@pytest.mark.parametrize("command", ["capture", "port", "check", "merge"])
def test_a_scheme_that_is_not_known_is_refused_by_its_name(portllm, tiny, tmp_path, command):
    base = shutil.copytree(tiny("base"), tmp_path / "base")
    adapter = tiny("adapter")
    tensors = load_file(base / "model.safetensors")
    codes = {name: torch.zeros(3, 2, dtype=torch.int16) for name in tensors if name.endswith("q_proj.weight")}
    renamed = {name.replace(".weight", ".codes"): value for name, value in codes.items()}
    save_file({**{n: v for n, v in tensors.items() if n not in codes}, **renamed}, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "aqlm"}}))
    done = portllm(
        *{
            "capture": ("capture", "--adapter", adapter, "--base", base, "-o", tmp_path / "out"),
            "port": ("port", adapter, "--evolved", base, "-o", tmp_path / "out"),
            "check": ("check", adapter, "--base", tiny("base"), "--evolved", base),
            "merge": ("merge", adapter, "--into", base, "-o", tmp_path / "out"),
        }[command]
    )
    assert done.status in (1, 3)
    assert "quantized by aqlm, which is not supported" in done.out + done.err
    assert "no such module" not in done.out + done.err
    assert portllm("inspect", base).status == 0
