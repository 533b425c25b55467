import contextlib
import importlib
import json
import logging
import shutil
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from portllm.errors import AdapterFormatError, CheckpointError, MissingExtraError, PortLLMError
from portllm.running import model as running_model
from portllm.running.model import (
    add_adapter,
    attach_adapter,
    choose_device,
    compute_dtype,
    load_model,
    load_tokenizer,
    quiet,
    save_model,
)
from tests.models import load_tuned, logits

CPU = torch.device("cpu")

computed = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
"""What models are computed in, here or on another processor; PEFT's are told to do as ours, bit for bit."""


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_comes_in_the_dtype_it_is_computed_in_or_the_one_asked_for(tiny, stored):
    folder = tiny("base", dtype=stored)
    model = load_model(folder, device=CPU)
    assert (model.dtype, model.config.dtype) == (compute_dtype(stored, CPU), stored)
    assert load_model(folder, device=CPU, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("able", "computed"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_a_cpu_computes_in_bfloat16_only_where_it_has_instructions_for_it(monkeypatch, able, computed):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    monkeypatch.setattr(running_model, "onednn_uses_bfloat16", lambda: True)
    assert compute_dtype(torch.bfloat16, CPU) == computed
    assert compute_dtype(torch.float16, CPU) == torch.float32
    assert compute_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16


def test_instructions_that_onednn_may_not_use_are_not_counted_on(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(running_model, "onednn_uses_bfloat16", lambda: False)
    assert compute_dtype(torch.bfloat16, CPU) == torch.float32


def test_a_torch_that_cannot_say_what_the_cpu_can_computes_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert compute_dtype(torch.bfloat16, CPU) == torch.float32


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_model_is_saved_in_the_dtype_it_came_in(tiny, tmp_path, stored):
    base = tiny("base", dtype=stored)
    save_model(load_model(base, device=CPU, dtype=torch.float32), tmp_path)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == stored for name in before)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_the_attention_kernel_is_chosen_by_the_longest_input(tiny):
    short, long = (load_model(tiny("base"), device=CPU, longest=longest) for longest in (512, 513))
    assert (short.config._attn_implementation, long.config._attn_implementation) == ("eager", "sdpa")


def test_a_folder_that_is_not_there_is_told(tmp_path):
    for load in (lambda folder: load_model(folder, device=CPU), load_tokenizer):
        with pytest.raises(CheckpointError, match="is not a folder"):
            load(tmp_path / "missing")


def test_a_folder_without_a_model_or_without_a_tokenizer_is_told(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="contains neither"):
        load_model(tmp_path, device=CPU)
    with pytest.raises(CheckpointError, match="cannot load its tokenizer"):
        load_tokenizer(tiny("base"))


def test_pickled_weights_are_refused(tiny, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny("base"), folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="contains pickled weights"):
        load_model(folder, device=CPU)


@computed
@torch.no_grad()
def test_an_adapter_gives_the_logits_that_peft_gives(tiny, dtype):
    base, adapter = tiny("base"), tiny("adapter")
    attached = attach_adapter(load_model(base, device=CPU, dtype=dtype, longest=513), adapter, name="patch")
    assert torch.equal(logits(attached), logits(load_tuned(base, adapter, dtype=dtype)))


@computed
@torch.no_grad()
def test_adapters_beside_each_other_are_switched_and_do_not_mix(tiny, dtype):
    base, one, other = tiny("base"), tiny("adapter"), tiny("adapter", seed=7, r=2, target_modules=["q_proj"])
    both = attach_adapter(load_model(base, device=CPU, dtype=dtype, longest=513), one, name="one")
    add_adapter(both, other, name="other")
    assert torch.equal(logits(both), logits(load_tuned(base, one, dtype=dtype)))
    both.set_adapter("other")
    assert torch.equal(logits(both), logits(load_tuned(base, other, dtype=dtype)))


def test_an_adapter_is_not_trained_by_being_attached(tiny):
    attached = attach_adapter(load_model(tiny("base"), device=CPU), tiny("adapter"), name="patch")
    assert not any(parameter.requires_grad for name, parameter in attached.named_parameters() if "lora" in name)


def test_an_adapter_of_another_width_is_refused(tiny):
    narrow = tiny("adapter", of=tiny("base", inner=24))
    with pytest.raises(AdapterFormatError, match="cannot load it onto this model"):
        attach_adapter(load_model(tiny("base"), device=CPU), narrow, name="patch")


def test_an_adapter_with_tensors_that_match_nothing_is_refused(tiny):
    deep = tiny("adapter", of=tiny("base", layers=3))
    with pytest.raises(AdapterFormatError, match="14 tensors match no module of the model") as caught:
        attach_adapter(load_model(tiny("base"), device=CPU), deep, name="patch")
    assert "layers.2" in str(caught.value)


def test_an_adapter_that_leaves_modules_out_is_refused(tiny):
    deep = tiny("base", layers=3)
    patched = attach_adapter(load_model(deep, device=CPU), tiny("adapter", of=deep), name="whole")
    with pytest.raises(AdapterFormatError, match="14 tensors are not in the adapter"):
        add_adapter(patched, tiny("adapter"), name="short")


def test_a_folder_without_an_adapter_is_refused(tiny, tmp_path):
    with pytest.raises(AdapterFormatError, match=r"has no 'adapter_config\.json'"):
        attach_adapter(load_model(tiny("base"), device=CPU), tmp_path, name="patch")
    shutil.copy(tiny("adapter") / "adapter_config.json", tmp_path)
    with pytest.raises(AdapterFormatError, match=r"has no 'adapter_model\.safetensors'"):
        attach_adapter(load_model(tiny("base"), device=CPU), tmp_path, name="patch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_auto_is_the_cpu_and_cuda_is_refused():
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(PortLLMError, match="finds no CUDA device"):
        choose_device("cuda")


@pytest.mark.parametrize("bars", [True, False])
def test_quiet_puts_back_what_it_found(bars):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.set_verbosity_info()
        (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
        with contextlib.suppress(KeyError), quiet():
            assert transformers_logging.get_verbosity() == logging.ERROR
            assert not transformers_logging.is_progress_bar_enabled()
            warnings.warn("not to be seen", stacklevel=1)
            raise KeyError
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled() == bars
    finally:
        transformers_logging.set_verbosity(before[0])
        (transformers_logging.enable_progress_bar if before[1] else transformers_logging.disable_progress_bar)()


@pytest.mark.parametrize("missing", ["peft", "transformers"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "portllm.foreign")
    with pytest.raises(MissingExtraError, match=rf"'{missing}'.*pip install 'peft>=.*' 'transformers>="):
        importlib.import_module("portllm.foreign")
