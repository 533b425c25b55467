"""What hooks keep of a pass is what the whole activations say, whatever the batches."""

import pytest
import torch

from portllm.running.model import attach_adapter, load_model
from portllm.running.observation import observe, spread_positions
from tests.language import make_reader
from tests.models import make_adapter, make_base

CPU = torch.device("cpu")
FLOAT32_NOISE = 1e-5
PROMPTS = [(5, 9, 30, 7, 12), (8, 3), (21, 22, 23, 24, 25, 26, 27, 28), (4,)]
DOWN, QUERY = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(make_reader(tmp_path_factory.mktemp("reader"), dtype=torch.float32), device=CPU)


def factors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        DOWN: [torch.randn(rank, 20, generator=generator) for rank in (2, 3)],
        QUERY: [torch.randn(4, 12, generator=generator)],
    }


def whole_activations(model, prompt):
    """Inputs of the modules, states after each layer, and logits of one prompt by itself."""
    inputs = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: inputs.update({name: args[0][0]})
        )
        for name in (DOWN, QUERY)
    ]
    with torch.no_grad():
        output = model(torch.tensor([prompt]), output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return inputs, output


def test_it_is_what_each_prompt_gives_by_itself(model):
    seen = observe(model, PROMPTS, device=CPU, batch_size=3, factors=factors(), positions=3, states=True)
    start = 0
    for row, prompt in enumerate(PROMPTS):
        inputs, output = whole_activations(model, prompt)
        places = spread_positions(len(prompt), 3)
        for name, matrices in factors().items():
            for read, a in zip(seen.reads[name], matrices, strict=True):
                expected = inputs[name][places] @ a.T
                torch.testing.assert_close(read[start : start + len(places)], expected, rtol=1e-4, atol=FLOAT32_NOISE)
        torch.testing.assert_close(seen.logits[row], output.logits[0, -1], rtol=1e-4, atol=FLOAT32_NOISE)
        # The last of transformers' states comes after the final norm; ours are what layers put out.
        torch.testing.assert_close(seen.states[0][row], output.hidden_states[1][0, -1], rtol=1e-4, atol=FLOAT32_NOISE)
        start += len(places)
    assert len(seen.states) == 2
    assert len(seen.reads[DOWN][0]) == start == 3 + 2 + 3 + 1


def test_batches_change_nothing_but_rounding(model):
    one, other = (
        observe(model, PROMPTS, device=CPU, batch_size=size, factors=factors(), positions=2, states=True)
        for size in (1, 4)
    )
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=FLOAT32_NOISE)
    torch.testing.assert_close(one.states, other.states, rtol=1e-4, atol=FLOAT32_NOISE)
    torch.testing.assert_close(one.reads, other.reads, rtol=1e-4, atol=FLOAT32_NOISE)


def test_hooks_are_gone_afterwards(model):
    def count():
        return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]

    before = count()
    observe(model, PROMPTS, device=CPU, batch_size=4, factors=factors(), states=True)
    assert count() == before


def test_a_module_that_the_model_lacks_is_left_out(model):
    unknown = {"model.layers.9.mlp.down_proj": [torch.zeros(2, 20)]}
    assert observe(model, PROMPTS, device=CPU, batch_size=4, factors=unknown).reads == {}


def test_a_module_that_is_given_some_tokens_only_is_left_out(model):
    class Routed(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return torch.cat([self.inner(x.flatten(0, 1)[:3]), self.inner(x.flatten(0, 1)[3:])]).view(x.shape)

    layer = model.get_submodule("model.layers.1.mlp")
    dense = layer.act_fn
    layer.act_fn = Routed(dense)
    try:
        name = "model.layers.1.mlp.act_fn.inner"
        seen = observe(model, PROMPTS, device=CPU, batch_size=4, factors={name: [torch.ones(1, 20)]})
    finally:
        layer.act_fn = dense
    assert seen.reads == {}


def test_the_head_is_read_at_the_last_token(model):
    a = torch.ones(1, 12)
    seen = observe(model, PROMPTS, device=CPU, batch_size=2, factors={"lm_head": [a]}, positions=2)
    (read,) = seen.reads["lm_head"]
    with torch.no_grad():
        last = model(torch.tensor([PROMPTS[0]]), output_hidden_states=True).hidden_states[-1][0, -1]
    torch.testing.assert_close(read[1], a @ last, rtol=1e-4, atol=FLOAT32_NOISE)
    assert read[0] == 0.0  # a token that the head is not given


def test_modules_under_an_adapter_are_given_what_they_get_there(tmp_path):
    folder = make_reader(tmp_path / "base", dtype=torch.float32)
    patched = attach_adapter(load_model(folder, device=CPU), make_adapter(folder, tmp_path / "adapter"), name="patch")
    assert observe(patched.eval(), PROMPTS, device=CPU, batch_size=4).logits.shape == (4, patched.config.vocab_size)


def test_gpt2_has_layers_too(tmp_path):
    model = load_model(make_base(tmp_path / "gpt2", kind="gpt2", dtype=torch.float32), device=CPU)
    prompts = [(5, 9, 30), (8, 3)]
    seen = observe(
        model, prompts, device=CPU, batch_size=2, factors={"transformer.h.0.mlp.c_fc": [torch.ones(1, 12)]}, states=True
    )
    assert [state.shape for state in seen.states] == [(2, 12)] * 2
    assert seen.reads["transformer.h.0.mlp.c_fc"][0].shape == (2, 1)
