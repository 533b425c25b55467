"""QLoRA on the command line: said once at the capture, measured at the merge."""

import json

import torch


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
    assert ("warning: the merge adds back far more" in shown) == (told["ratio"] >= 10)


def test_a_small_patch_is_warned_of(portllm, tiny, tmp_path):
    base = tiny("base", dtype=torch.bfloat16)
    adapter = tiny("adapter", of=base, lora_alpha=0.01)
    portllm("capture", "--adapter", adapter, "--base", base, "--fitted-to", "fp4", "-o", tmp_path / "patch")
    shown = portllm("merge", tmp_path / "patch", "--into", base, "-o", tmp_path / "merged").out
    assert "warning: the merge adds back far more quantization error than patch" in shown


def test_options_that_do_not_go_together_are_wrong_usage(portllm, tmp_path):
    capture = ("capture", "--base", "b", "-o", tmp_path / "patch")
    assert portllm(*capture, "--adapter", "a", "--left-alone", "lm_head").status == 2
    assert portllm(*capture, "--tuned", "t", "--fitted-to", "nf4").status == 2
