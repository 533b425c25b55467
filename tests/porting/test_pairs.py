"""What is seen of each module of two models over the same text is what their own forward passes have there."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from portllm.checkpoint.open import open_checkpoint
from portllm.methods.contract import Seen
from portllm.porting.pairs import Pairs
from portllm.porting.prompts import Rows
from portllm.porting.reading import Reading
from portllm.porting.weights import PatchedWeights
from portllm.progress import silent
from portllm.running.layers import LayeredModel
from portllm.running.spool import Spool
from tests.language import make_reader
from tests.models import SEVEN, make_evolved

IDS = ((5, 9, 14, 200), (7, 3, 11, 60))
"""Of one length, so that a batch has them in this order."""

MODULES = [
    f"model.layers.{layer}.{'mlp' if name.split('_')[0] in ('gate', 'up', 'down') else 'self_attn'}.{name}"
    for layer in (0, 1)
    for name in SEVEN
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    base = make_reader(folder / "base", dtype=torch.float32)
    return base, make_evolved(base, folder / "evolved", drift=0.3)


def pairs_of(models, modules=MODULES, ids=IDS):
    device = torch.device("cpu")
    layered = [
        LayeredModel(folder, PatchedWeights(open_checkpoint(folder), None), device=device, longest=32)
        for folder in models
    ]
    rows, spool = Rows(ids, (1, 1), ("fit", "fit"), (0, 0)), Spool(models[0].parent)
    reading = Reading(rows, layered[0], modules, device, 2, spool)
    return {pair.module: pair for pair in Pairs(*layered, [reading], silent).over(modules)}


def seen(folder, ids=IDS):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, inputs, output, name=name: found.update({name: (inputs, output)}))
    with torch.no_grad():
        model(torch.tensor(ids))
    return {
        name: Seen(inputs[0].flatten(0, 1), (output[0] if isinstance(output, tuple) else output).flatten(0, 1))
        for name, (inputs, output) in found.items()
        if name in MODULES or name in ("model.layers.0", "model.layers.1")
    }


def test_inputs_are_those_of_the_forward_pass_and_outputs_have_what_spans_their_basis(models):
    pairs = pairs_of(models)
    assert list(pairs) == MODULES
    for side, folder in zip(("before", "after"), models, strict=True):
        whole = seen(folder)
        for name in MODULES:
            found, layer = getattr(pairs[name], side), name[: len("model.layers.0")]
            assert torch.allclose(found.x, whole[name].x, atol=1e-5)
            writes = name.endswith(("o_proj", "down_proj"))
            is_wide = name.endswith(("q_proj", "gate_proj", "up_proj"))
            wanted = whole[layer].y if writes else whole[name].y.abs() if is_wide else whole[name].y
            assert torch.allclose(found.y, wanted, atol=1e-5), name


def test_of_many_tokens_some_are_looked_at_the_same_in_both_models(models):
    many = tuple(tuple(range(start, start + 24)) for start in (3, 60))
    (pair,) = pairs_of(models, ["model.layers.1.self_attn.k_proj"], many).values()
    whole = seen(models[1], many)["model.layers.1.self_attn.k_proj"]
    assert len(pair.before.x) == len(pair.after.y) == 24, "two for each of twelve inputs"
    assert torch.allclose(pair.after.y, whole.y[::2], atol=1e-5)
