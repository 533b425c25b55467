"""A patch on a model in memory: PEFT's logits while it is on, the model's own bits when it is off."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import portllm
from portllm.errors import PlanRefusedError, PortLLMError
from tests import models

RECIPES = {
    "plain": {},
    "rank-stabilized, patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 9}},
    "a head": {"target_modules": ["q_proj", "lm_head"]},
    "an embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "saved modules": {"modules_to_save": ["norm"]},
    "biases": {"bias": "all"},
    "token rows": {"trainable_token_indices": [3, 5]},
}
TOLERANCE = 1e-5
"""Relative to the largest logit: PEFT scales outputs for DoRA and adds a second bias; here there is one of each."""


@pytest.fixture
def base(tiny):
    return tiny("base", tied=False, attention_bias=True, dtype=torch.float32)


def loaded(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_logits_are_pefts_and_afterwards_the_models_own(tiny, base, recipe):
    adapter = tiny("adapter", of=base, **RECIPES[recipe])
    model = loaded(base)
    before, kept, ids = models.logits(model), state(model), {id(p) for p in model.parameters()}
    with portllm.apply(model, adapter) as applied:
        assert torch.equal(models.logits(model), models.logits(models.load_tuned(base, adapter)))
        assert applied.is_on
    assert torch.equal(models.logits(model), before)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert {id(p) for p in model.parameters()} == ids
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes a bias of lora_B for a part of a matrix
@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}])
def test_what_peft_computes_in_another_order_is_applied_to_rounding(tiny, base, lora):
    adapter = tiny("adapter", of=base, **lora)
    model = loaded(base)
    before = models.logits(model)
    with portllm.apply(model, adapter):
        expected = models.logits(models.load_tuned(base, adapter))
        assert (models.logits(model) - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert torch.equal(models.logits(model), before)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_in_16_bit_gives_pefts_logits(tiny, tmp_path, kind):
    base = models.make_base(tmp_path / kind, kind=kind)
    lora = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True} if kind == "gpt2" else {}
    adapter = tiny("adapter", of=base, **lora)
    model = loaded(base)
    with portllm.apply(model, adapter):
        assert torch.equal(models.logits(model), models.logits(models.load_tuned(base, adapter)))


def test_rows_of_a_tied_embedding_are_the_heads_too(tiny):
    base = tiny("base", dtype=torch.float32)
    adapter = tiny("adapter", of=base, trainable_token_indices=[3, 5])
    model = loaded(base)
    with portllm.apply(model, adapter):
        assert torch.equal(models.logits(model), models.logits(models.load_tuned(base, adapter)))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_several_patches_add_up_and_leave_in_any_order(tiny, base):
    model = loaded(base)
    alone = models.logits(model)
    one = portllm.apply(model, tiny("adapter", of=base))
    with_one = models.logits(model)
    other = portllm.apply(model, tiny("adapter", of=base, seed=2, target_modules=["q_proj"], r=2))
    both = models.logits(model)
    assert not torch.equal(both, with_one)
    one.off()
    with_other = models.logits(model)
    one.on()
    other.off()
    assert torch.equal(models.logits(model), with_one)
    one.off()
    assert torch.equal(models.logits(model), alone)
    other.on()
    assert torch.equal(models.logits(model), with_other)


def test_a_ported_patch_takes_the_place_of_the_old_one(tiny, base):
    model = loaded(base)
    applied = portllm.apply(model, tiny("adapter", of=base, modules_to_save=["norm"]))
    new = tiny("adapter", of=base, seed=5, r=2, use_rslora=True, target_modules=["up_proj"])
    applied.swap(new)
    assert torch.equal(models.logits(model), models.logits(models.load_tuned(base, new)))
    with pytest.raises(PlanRefusedError):
        applied.swap(tiny("adapter", of=tiny("base", hidden=24)))
    assert torch.equal(models.logits(model), models.logits(models.load_tuned(base, new)))
    applied.off()
    assert torch.equal(models.logits(model), models.logits(loaded(base)))


def test_an_error_in_the_block_takes_the_patch_off(tiny, base):
    model = loaded(base)
    with pytest.raises(KeyError), portllm.apply(model, tiny("adapter", of=base)):
        raise KeyError
    assert torch.equal(models.logits(model), models.logits(loaded(base)))


def test_two_patches_cannot_replace_one_value(tiny, base):
    model = loaded(base)
    first, second = (tiny("adapter", of=base, seed=seed, modules_to_save=["norm"]) for seed in (1, 2))
    with portllm.apply(model, first):
        with pytest.raises(PortLLMError, match="another patch on this model replaces it"):
            portllm.apply(model, second)
        assert torch.equal(models.logits(model), models.logits(models.load_tuned(base, first)))


def test_what_does_not_fit_is_refused_with_all_of_it_named(tiny, base):
    with pytest.raises(PlanRefusedError) as refused:
        portllm.apply(loaded(base), tiny("adapter", of=tiny("base", layers=4)), allow_other_base=True)
    assert len(refused.value.refusals) == 2 * len(models.SEVEN)
    with pytest.raises(PlanRefusedError, match=r"the delta is \(in=24"):
        portllm.apply(loaded(base), tiny("adapter", of=tiny("base", hidden=24)))


def test_a_patch_of_another_base_is_refused(tiny, base, tmp_path):
    patch = portllm.capture(tiny("adapter", of=base), base=base, out=tmp_path / "patch")
    evolved = loaded(tiny("evolved", of=base))
    with pytest.raises(PlanRefusedError, match="belongs to"):
        portllm.apply(evolved, patch)
    with portllm.apply(evolved, patch, allow_other_base=True) as applied:
        assert applied.is_on
