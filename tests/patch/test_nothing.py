"""A patch that changes nothing is told from one that does."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.checking.check import check_weights
from portllm.checkpoint.open import open_checkpoint
from portllm.patch.adapter_folder import load_patch
from portllm.patch.nothing import why_nothing


def changed(adapter, folder, *, zeroed="none of them", **fields):
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {key: tensor * (-0.0 if zeroed in key else 1) for key, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return load_patch(folder)


def test_a_trained_patch_changes_something(tiny):
    assert why_nothing(load_patch(tiny("adapter"))) is None


@pytest.mark.parametrize("what", [{"zeroed": "lora_B"}, {"lora_alpha": 0}])
def test_a_patch_of_zeros_or_of_scale_zero_changes_nothing(what, tiny, tmp_path):
    patch = changed(tiny("adapter"), tmp_path / "zero", **what)
    assert why_nothing(patch).startswith(f"{patch.name} changes nothing: ")


def test_one_factor_that_is_not_zero_is_enough(tiny, tmp_path):
    assert why_nothing(changed(tiny("adapter"), tmp_path / "one", zeroed="layers.0")) is None


def test_check_says_that_there_is_nothing_to_hold(tiny, tmp_path):
    patch = changed(tiny("adapter"), tmp_path / "zero", zeroed="lora_B")
    report = check_weights(patch, base=open_checkpoint(tiny("base")), evolved=open_checkpoint(tiny("evolved")))
    assert not report.holds
    assert "there is nothing to hold" in report.patches[0].verdict.reasons[0].text
    assert torch.tensor(report.patches[0].delta_sq) == 0
