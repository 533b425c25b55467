"""A patch taken to a model that computes the same function in another basis is the same patch there."""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from portllm.methods.basis import input_factor, output_factor
from tests.models import SEVEN

HIDDEN, INNER, HEADS, KEY_HEADS, HEAD_DIM, VOCABULARY = 16, 28, 4, 2, 4, 97


def draws(seed):
    return torch.Generator().manual_seed(seed)


def rotation(size, seed):
    return torch.linalg.qr(torch.randn(size, size, generator=draws(seed), dtype=torch.float64)).Q


def rotation_of_planes(seed):
    """Of a head's dimensions, each plane that positions rotate by an angle of its own: what they commute with."""
    angles = torch.randn(HEAD_DIM // 2, generator=draws(seed), dtype=torch.float64)
    cos, sin = angles.cos().diag(), angles.sin().diag()
    return torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])


def make_llama(*, tied=False, biased=False):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=HEAD_DIM, tie_word_embeddings=tied,
        attention_bias=biased,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    generator = draws(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * drawn + (parameter.ndim == 1))
    return model


def twin_of(model):
    """The same function: the residual stream rotated, heads and units in another order, each head's basis rotated.

    Queries and keys are rotated together, as positions allow. Norms' weights are folded into what reads behind them, so
    that the norms commute with the rotation; a tied head becomes one of its own.
    """
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    twin = LlamaForCausalLM(config).double().eval()
    twin.load_state_dict({**model.state_dict(), "lm_head.weight": model.lm_head.weight.detach().clone()})
    turn = rotation(HIDDEN, 1)
    with torch.no_grad():
        embedding = twin.model.embed_tokens.weight
        embedding.copy_(embedding @ turn.T)
        twin.lm_head.weight.copy_(twin.lm_head.weight * twin.model.norm.weight @ turn.T)
        twin.model.norm.weight.fill_(1)
        for number, layer in enumerate(twin.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                for reader in readers:
                    reader.weight.copy_(reader.weight * norm.weight @ turn.T)
                norm.weight.fill_(1)
            for writer in (attention.o_proj, mlp.down_proj):
                writer.weight.copy_(turn @ writer.weight)
                if writer.bias is not None:
                    writer.bias.copy_(turn @ writer.bias)
            units = torch.randperm(INNER, generator=draws(10 + number))
            for module in (mlp.gate_proj, mlp.up_proj):
                module.weight.copy_(module.weight[units])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, units])
            key_order, group = [1, 0], HEADS // KEY_HEADS
            query_order = [key * group + head for key in key_order for head in (1, 0)]
            turns = torch.stack([rotation(HEAD_DIM, 20 + key) for key in range(KEY_HEADS)])
            planes = torch.stack([rotation_of_planes(30 + key) for key in range(KEY_HEADS)])
            for module, order, turned in (
                (attention.q_proj, query_order, planes.repeat_interleave(group, dim=0)),
                (attention.k_proj, key_order, planes),
                (attention.v_proj, key_order, turns),
            ):
                for tensor in module.parameters():
                    heads = tensor.view(-1, HEAD_DIM, tensor[0].numel())[order]
                    tensor.copy_((turned @ heads).reshape(tensor.shape))
            output = attention.o_proj.weight
            columns = output.view(HIDDEN, HEADS, HEAD_DIM)[:, query_order].unbind(1)
            output.copy_(torch.cat([head @ turns[place // group].T for place, head in enumerate(columns)], dim=1))
    return twin


@dataclass
class Seen:
    x: torch.Tensor
    y: torch.Tensor


def seen(model, ids):
    """Input and output of every ported module; of units, the absolute values."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in SEVEN:

            def note(module, inputs, output, name=name):
                y = output.abs() if module.out_features > module.in_features else output
                found[name] = Seen(inputs[0].flatten(0, 1), y.flatten(0, 1))

            hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def patched(model, factors):
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for name, (a, b) in factors.items():
            tuned.get_submodule(name).weight += b @ a
    return tuned


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", [{}, {"tied": True}, {"biased": True}], ids=["plain", "tied head", "biases"])
def test_on_a_twin_the_patch_comes_back_whole(kind):
    base = make_llama(**kind)
    twin = twin_of(base)
    unseen, texts = (
        torch.randint(VOCABULARY, shape, generator=draws(seed)) for seed, shape in ((3, (4, 9)), (4, (24, 8)))
    )
    assert (logits(base, unseen) - logits(twin, unseen)).abs().max() < 1e-5, "the twin is none"
    generator = draws(5)
    patch = {
        name: tuple(
            0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, d_in), (d_out, 3))
        )
        for name, module in base.named_modules()
        if name.rpartition(".")[2] in SEVEN
        for d_out, d_in in [module.weight.shape]
    }
    before, after = seen(base, texts), seen(twin, texts)
    ported = {}
    for name, (a, b) in patch.items():
        ported[name] = (
            input_factor(a, before[name].x, after[name].x)[0],
            output_factor(b, before[name].y, after[name].y)[0],
        )
    wanted = logits(patched(base, patch), unseen)
    size = (wanted - logits(base, unseen)).abs().max()
    assert (logits(patched(twin, ported), unseen) - wanted).abs().max() < 1e-4 * size
    assert (logits(patched(twin, patch), unseen) - wanted).abs().max() > 0.5 * size


def test_of_what_the_tokens_do_not_span_nothing_is_carried_and_the_shares_say_so():
    generator = draws(6)
    few = torch.randn(5, 8, generator=generator)
    turn = rotation(8, 7).float()
    a, b = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
    new_a, misread = input_factor(a, few, few @ turn.T)
    new_b, left_out = output_factor(b, few, few @ turn.T)
    inside = torch.linalg.pinv(few.double()) @ few.double()
    assert torch.allclose(new_a, a.double() @ inside @ turn.double().T, atol=1e-5)
    assert torch.allclose(new_b, turn.double() @ inside @ b.double(), atol=1e-5)
    assert misread < 1e-5, "these tokens are read as before"
    outside = torch.linalg.norm(b - inside @ b.double()) / torch.linalg.norm(b)
    assert left_out == pytest.approx(float(outside), abs=1e-5)
    _, misread = input_factor(a, torch.randn(40, 8, generator=generator), torch.randn(40, 8, generator=generator))
    assert misread > 0.5, "inputs that have nothing to do with each other"
