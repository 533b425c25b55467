"""A twin computes what the model computes, and its weights have are unrelated to with the model's."""

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from portllm.errors import CheckpointError
from portllm.study.parts.twin import Twin
from tests.models import HEAD_DIM, HEADS, HIDDEN, INNER, make_model

IDS = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 31, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 64,
}  # fmt: skip


def logits(model):
    with torch.no_grad():
        return model.double().eval()(input_ids=IDS).logits


def twin_of(model, **changes):
    config = model.config
    sizes = {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "heads": config.num_attention_heads,
        "key_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "seed": 1,
    }
    return Twin(**{**sizes, **changes})


def randomized(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    return model


def load_twin(model, twin):
    changed = {name: twin.changed(name, tensor) for name, tensor in model.state_dict().items()}
    other = type(model)(model.config)
    other.load_state_dict(changed)
    return other


@pytest.mark.parametrize(
    "model",
    [
        lambda: make_model(dtype=torch.float32),
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True)),
        lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, layer_types=["sliding_attention", "full_attention"])),
    ],
    ids=["llama-tied", "llama-biased", "qwen3", "gemma3"],
)
def test_a_twin_computes_the_same_function(model):
    model = randomized(model())
    expected = logits(model)
    found = logits(load_twin(model, twin_of(model)))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_weights_of_a_twin_are_the_same_numbers_elsewhere():
    model = randomized(LlamaForCausalLM(LlamaConfig(**SIZES)))
    twin = twin_of(model)
    for name, tensor in model.state_dict().items():
        changed = twin.changed(name, tensor)
        assert torch.equal(changed.abs().flatten().sort().values, tensor.abs().flatten().sort().values)
        if tensor.ndim == 2:
            cosine = torch.nn.functional.cosine_similarity(changed.flatten(), tensor.flatten(), dim=0)
            assert abs(cosine) < 0.5, name


def test_a_twin_is_a_function_of_its_seed():
    weight = torch.arange(HIDDEN * INNER).reshape(HIDDEN, INNER).float()
    sizes = {"hidden": HIDDEN, "inner": INNER, "heads": HEADS, "key_heads": 1, "head_dim": HEAD_DIM}
    name = "model.layers.0.mlp.down_proj.weight"
    one, again, other = (Twin(**sizes, seed=seed).changed(name, weight) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_layers_have_orders_of_their_own_for_all_but_the_residual_stream():
    model = randomized(LlamaForCausalLM(LlamaConfig(**SIZES)))
    units = [twin_of(model).changed(f"model.layers.{n}.mlp.up_proj.bias", torch.arange(20)).tolist() for n in (0, 1)]
    assert units[0] != units[1]


@pytest.mark.parametrize("name", ["model.layers.0.block_sparse_moe.gate.weight", "transformer.h.0.attn.c_attn.weight"])
def test_a_tensor_that_is_not_known_is_refused_by_name(name):
    sizes = {"hidden": HIDDEN, "inner": INNER, "heads": HEADS, "key_heads": 1, "head_dim": HEAD_DIM}
    with pytest.raises(CheckpointError, match=name):
        Twin(**sizes, seed=0).changed(name, torch.ones(2, 2))
