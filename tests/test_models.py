"""The tiny models that the tests stand on are what they say."""

import pytest
import torch
from safetensors import safe_open

from tests import models


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (not a mapping)
    return found


def test_the_same_call_makes_the_same_bytes(tmp_path):
    for place in ("one", "two"):
        base = models.make_base(tmp_path / place / "base")
        models.make_adapter(base, tmp_path / place / "adapter")
    for file in ("base/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_no_weight_of_a_layer_is_square(tiny):
    for name, tensor in tensors(tiny("base")).items():
        assert tensor.ndim == 1 or tensor.shape[0] != tensor.shape[1], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_is_split_into_several_shards(tiny, dtype):
    assert len(list(tiny("base", dtype=dtype, max_shard_size=models.SEVERAL_SHARDS).glob("*.safetensors"))) > 2


def test_an_adapter_changes_the_logits(tiny):
    tuned = models.load_tuned(tiny("base"), tiny("adapter"))
    with tuned.disable_adapter():
        before = models.logits(tuned)
    assert (models.logits(tuned) - before).abs().max() > 0.1


def test_an_evolved_model_is_near_its_base_and_differs_in_every_tensor(tiny):
    base, evolved = tensors(tiny("base")), tensors(tiny("evolved"))
    for name, weight in base.items():
        moved = (evolved[name].float() - weight.float()).norm() / weight.float().norm()
        assert 0 < moved < 0.5, name
