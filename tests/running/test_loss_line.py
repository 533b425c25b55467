import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from portllm.running.loss_line import LossLine, blended, measure_line
from tests.models import logits, make_adapter

FLOAT64_NOISE = 1e-10


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    how = {"a": {}, "b": {"r": 2, "use_rslora": True}}
    return {name: make_adapter(tiny("base"), folder / name, seed=len(name), **lora) for name, lora in how.items()}


@pytest.fixture
def model(tiny, adapters):
    base = AutoModelForCausalLM.from_pretrained(tiny("base"), dtype=torch.float64)
    patched = PeftModel.from_pretrained(base, adapters["a"], adapter_name="a", autocast_adapter_dtype=False)
    patched.load_adapter(adapters["b"], adapter_name="b", autocast_adapter_dtype=False)
    return patched.double().eval()


def dense_sum(model, weights):
    """A plain model with `W + Σ w_i Δ_i` in its weights, by PEFT's own delta of each layer."""
    deltas = {
        name: {adapter: layer.get_delta_weight(adapter) for adapter in weights}
        for name, layer in model.base_model.model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    plain = model.unload()
    with torch.no_grad():
        for name, found in deltas.items():
            plain.get_submodule(name).weight += sum(weights[adapter] * delta for adapter, delta in found.items())
    return plain


def test_a_blend_is_the_weighted_sum_of_the_deltas(model):
    weights = {"a": 0.3, "b": 0.7}
    with blended(model, weights), torch.no_grad():
        blend = logits(model.double())
    expected = logits(dense_sum(model, weights))
    torch.testing.assert_close(blend, expected, rtol=1e-5, atol=1e-5)


def test_afterwards_the_model_is_as_before(model):
    before = logits(model)
    with pytest.raises(RuntimeError, match="stop"), blended(model, {"b": 0.5}):
        raise RuntimeError("stop")
    assert model.active_adapters == ["a"]
    assert torch.equal(logits(model), before)


def test_the_ends_of_the_line_are_the_adapters(model):
    def losses_of(patched):
        return logits(patched).logsumexp(dim=-1).flatten().tolist()

    line = measure_line(model, "a", "b", points=(0.0, 0.5, 1.0), losses_of=losses_of)
    assert line.losses[0] == tuple(losses_of(model))
    model.set_adapter("b")
    assert line.losses[-1] == tuple(losses_of(model))
    assert line.losses[1] not in (line.losses[0], line.losses[-1])


@given(st.lists(st.tuples(*[st.floats(-5, 5)] * 3), min_size=1, max_size=6))
def test_there_is_no_barrier_on_a_convex_line_and_never_less_than_none(rows):
    points = (0.0, 0.25, 0.5, 1.0)

    def losses(bend):
        return tuple(tuple(a * t + b + bend * abs(c) * t * (1 - t) for a, b, c in rows) for t in points)

    assert LossLine(points, losses(-1)).barrier == pytest.approx(0.0, abs=FLOAT64_NOISE)
    concave = LossLine(points, losses(1))
    assert concave.barrier == pytest.approx(sum(abs(c) for _, _, c in rows) / len(rows) / 4, abs=FLOAT64_NOISE)


@pytest.mark.parametrize("points", [(0.0,), (0.0, 0.5), (0.5, 1.0), (0.0, 1.0, 0.5)])
def test_points_that_do_not_rise_from_zero_to_one_are_refused(points):
    with pytest.raises(ValueError, match="rise from 0 to 1"):
        LossLine(points, tuple((0.0,) for _ in points))
