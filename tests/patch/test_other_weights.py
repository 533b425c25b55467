"""Weights in files of their own beside an adapter: a value head goes along, and nothing trained is left out."""

import json
import runpy
import shlex
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import AdapterFormatError, PlanRefusedError
from portllm.inspecting.inspect import summarize_patch
from portllm.merging.in_place import merge_in_place
from portllm.merging.merge import merge
from portllm.merging.plan import plan_merge
from portllm.patch.adapter_folder import load_patch
from portllm.patch.other_weights import why_incomplete
from portllm.porting.port import port
from portllm.verifying.verify import verify

FILE = "value_head.safetensors"


@pytest.fixture
def made(tiny, tmp_path):
    """A base, and an adapter with a value head in a file of its own."""
    base, adapter = shutil.copytree(tiny("base"), tmp_path / "base"), shutil.copytree(tiny("adapter"), tmp_path / "a")
    save_file({"v_head.summary.weight": torch.ones(1, 20), "v_head.summary.bias": torch.ones(1)}, adapter / FILE)
    return base, adapter


def test_a_value_head_goes_with_the_patch_into_port_and_merge(made, tiny, tmp_path):
    base, adapter = made
    head = (adapter / FILE).read_bytes()
    patch = capture_adapter(load_patch(adapter), base=open_checkpoint(base), out=tmp_path / "patch")
    assert FILE in patch.record.files
    assert FILE in summarize_patch(patch).beside
    port(patch, evolved=tiny("evolved"), out=tmp_path / "ported")
    merge(patch, into=base, out=tmp_path / "merged")
    for name in ("patch", "ported", "merged"):
        assert (tmp_path / name / FILE).read_bytes() == head
        assert verify(tmp_path / name).verified
        assert verify(tmp_path / name).notes == ("not covered by the record: README.md",)
    assert any(FILE in note for note in plan_merge(patch, into=open_checkpoint(base)).notes)
    (tmp_path / "merged" / FILE).write_bytes(b"another")
    assert not verify(tmp_path / "merged").verified


def test_it_stays_when_the_evolved_model_has_another_tokenizer(made, tiny, tmp_path):
    base, adapter = made
    evolved = shutil.copytree(tiny("evolved"), tmp_path / "evolved")
    for folder, tokens in ((base, "ab"), (adapter, "ab"), (evolved, "ba")):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {t: n for n, t in enumerate(tokens)}}}))
    port(load_patch(adapter), base=base, evolved=evolved, out=tmp_path / "ported")
    assert (tmp_path / "ported" / FILE).read_bytes() == (adapter / FILE).read_bytes()


def test_a_model_keeps_its_own_value_head(made, tmp_path):
    base, adapter = made
    (adapter / FILE).rename(base / FILE)
    merge(load_patch(adapter), into=base, out=tmp_path / "merged")
    assert (tmp_path / "merged" / FILE).read_bytes() == (base / FILE).read_bytes()
    assert verify(tmp_path / "merged").verified


def test_a_merge_in_place_does_not_leave_it_out(made):
    base, adapter = made
    with pytest.raises(PlanRefusedError, match=f"{FILE} of the patch would have to be written"):
        merge_in_place(adapter, base)


@pytest.mark.parametrize("file", ["value_head.bin", "pytorch_model.bin"])
def test_a_pickled_value_head_is_refused_until_it_is_converted(file, made):
    _, adapter = made
    (adapter / file).write_bytes(b"a pickle")
    load_patch(adapter)
    (adapter / FILE).unlink()
    with pytest.raises(AdapterFormatError, match=f"{file} beside an adapter holds a value head.*{FILE}"):
        load_patch(adapter)


@pytest.mark.parametrize(
    "file", ["non_lora_trainables.bin", "new_embeddings.safetensors", "vit.safetensors", "reward_head.pt"]
)
def test_trained_values_that_peft_does_not_load_are_refused(file):
    assert file in why_incomplete(["adapter_model.safetensors", file], "a")


@pytest.mark.parametrize(
    "file",
    ["adapter_model.bin", "model.safetensors", "model-00001-of-00002.safetensors", "optimizer.pt", "rng_state_0.pth",
     "training_args.bin", "scheduler.pt", "0000100_adapters.safetensors", "ggml-adapter-model.bin", "optimizer.bin",
     "pytorch_model-00001-of-00002.bin", "2_Dense/dense.bin", "random_states_0.pkl",
     "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
)  # fmt: skip
def test_the_state_of_a_training_run_and_whole_models_are_no_part_of_an_adapter(file):
    assert why_incomplete(["adapter_model.safetensors", file], "a") is None


def test_an_adapter_in_several_files_is_named_with_the_command_that_joins_them(tiny, tmp_path, monkeypatch):
    adapter = shutil.copytree(tiny("adapter"), tmp_path / "a")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for number, names in enumerate((sorted(tensors)[:2], sorted(tensors)[2:]), start=1):
        save_file({name: tensors[name] for name in names}, adapter / f"adapter_model-0000{number}-of-00002.safetensors")
    file.unlink()
    with pytest.raises(AdapterFormatError, match="in several files") as caught:
        load_patch(adapter)
    python, flag, program, *arguments = shlex.split(str(caught.value).partition("Join them: ")[2].rstrip("."))
    assert (python, flag) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    (tmp_path / "command.py").write_text(program)
    runpy.run_path(str(tmp_path / "command.py"))
    assert load_file(file).keys() == tensors.keys()
    load_patch(adapter)
