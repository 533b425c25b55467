"""Fused LoRA layers against PEFT's own forward pass."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from portllm.running.fused_lora import _in_dtype, fuse
from portllm.running.model import load_model

IDS = torch.tensor([[5, 9, 2, 7], [3, 3, 8, 1]])


def patched(model, *, seed=0, **options):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    return get_peft_model(model, config).eval()


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def layer_of(model):
    return model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")


@pytest.fixture
def llama(tiny):
    return load_model(tiny("base"), device=torch.device("cpu"), dtype=torch.float32)


def test_logits_are_those_of_peft(llama):
    model = patched(llama)
    wanted = logits(model)
    torch.testing.assert_close(logits(fuse(model)), wanted, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert (logits(model) - wanted).abs().max() > 1e-3


def test_an_adapter_that_is_put_beside_and_switched_on_counts(llama):
    model = fuse(patched(llama))
    other = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model.add_adapter("other", other)
    for names in (["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        model.eval()
        layers = [module for module in model.modules() if "forward" in vars(module)]
        found = logits(fuse(model))
        for layer in layers:
            del layer.forward
        torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)
        fuse(model)


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_not_plain_lora_is_left_to_peft(llama, options):
    model = patched(llama, **options)
    wanted = logits(model)
    assert torch.equal(logits(fuse(model)), wanted)


def test_other_dtypes_are_left_to_peft(llama):
    model = patched(llama.half())
    wanted = logits(model)
    assert torch.equal(logits(fuse(model)), wanted)


@pytest.mark.parametrize("is_stored_so", [False, True], ids=["factors in float32", "factors in bfloat16"])
def test_in_bfloat16_a_layer_is_as_near_to_float64_as_peft_is_but_for_one_more_rounding(llama, is_stored_so):
    model = patched(llama.bfloat16())
    layer = layer_of(model)
    if is_stored_so:
        layer.lora_A.bfloat16(), layer.lora_B.bfloat16()
    x = torch.randn(64, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    a, b = (factor["default"].weight.double() for factor in (layer.lora_A, layer.lora_B))
    exact = x.double() @ (layer.base_layer.weight.double() + layer.scaling["default"] * b @ a).T
    with torch.inference_mode():
        by_peft = layer(x).double()
        fused = layer_of(fuse(model))(x).double()
    assert 0 < (fused - exact).norm() <= 2**0.5 * (by_peft - exact).norm()


def test_factors_in_two_parts_have_the_product_of_those_that_they_are_parts_of():
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((4, 32), (48, 4)))
    in_parts, in_parts_b = (each.double() for each in _in_dtype(a, b, torch.bfloat16))
    exact = b.double() @ a.double()
    assert (in_parts_b @ in_parts - exact).norm() < 2**-14 * exact.norm()
    assert (b.bfloat16().double() @ a.bfloat16().double() - exact).norm() > 2**-10 * exact.norm()


def test_gradients_reach_the_factors(llama):
    model = fuse(patched(llama))
    model(input_ids=IDS).logits.sum().backward()
    assert layer_of(model).lora_A["default"].weight.grad.abs().max() > 0


def test_no_more_than_two_products_and_one_sum(llama):
    model = fuse(patched(llama))
    layer, x = layer_of(model), torch.ones(1, 3, model.config.hidden_size)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        layer(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::addmm_"] == 1
    assert counts.keys().isdisjoint({"aten::mul", "aten::add", "aten::addmm"})
