"""Experts that a file has the other way round than the running model: transformers turns them by their shapes."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from portllm.capturing.tuned import capture_tuned
from portllm.checkpoint.model.families import family_of
from portllm.checkpoint.open import open_checkpoint
from portllm.merging.merge import merge
from portllm.merging.options import MergeOptions
from portllm.patch.adapter_folder import load_patch
from tests.model_types import RIGHT, Sweep, logits

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of tiny vocabularies and of patterns


ANY_BASE = MergeOptions(allow_other_base=True)


def turned(folder, out):
    """The model with each expert's matrices turned round, as Qwen released it."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {n: t.transpose(1, 2).contiguous() for n, t in tensors.items() if ".experts." in n}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(out)


def test_an_adapter_is_merged_and_captured_in_either_layout(tmp_path):
    sweep = Sweep(family_of({"model_type": "qwen3_vl_moe"}), tmp_path)
    experts = [name for name, parameter in sweep.model.named_parameters() if sweep._is_experts(name, parameter)]
    wanted = sweep.train(tmp_path / "adapter", {"target_modules": sweep.linear()[:2], "target_parameters": experts})
    base = turned(tmp_path / "base", tmp_path / "released")
    shapes = [base.infos[name].shape for name in experts[:2]]
    assert shapes == [tuple(sweep.base.infos[name].shape[axis] for axis in (0, 2, 1)) for name in experts[:2]]
    merge(load_patch(tmp_path / "adapter"), into=base, out=tmp_path / "merged")
    assert sweep.compared(logits(sweep.load("merged")), wanted) == RIGHT
    capture_tuned(base, open_checkpoint(tmp_path / "merged"), out=tmp_path / "patch")
    merge(load_patch(tmp_path / "patch"), into=sweep.base, out=tmp_path / "other", options=ANY_BASE)
    assert sweep.compared(logits(sweep.load("other")), wanted) == RIGHT
