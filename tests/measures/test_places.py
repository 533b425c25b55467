"""Places of tensors, from their names."""

import pytest

from portllm.measures.places import TensorPlace, place_of


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("transformer.h.11.attn.c_attn.weight", TensorPlace("transformer.h", 11, "attn.c_attn")),
        ("layers.0.mlp.up_proj.weight", TensorPlace("layers", 0, "mlp.up_proj")),
        ("model.layers.2.mlp.experts.gate_up_proj", TensorPlace("model.layers", 2, "mlp.experts.gate_up_proj")),
        ("model.layers.2.mlp.experts.5.w1.weight", TensorPlace("model.layers", 2, "mlp.experts.w1", is_expert=True)),
        ("model.norm.weight", TensorPlace("", -1, "model.norm")),
        ("lm_head.weight", TensorPlace("", -1, "lm_head")),
        ("visual.blocks.3.attn.qkv.bias", TensorPlace("visual.blocks", 3, "attn.qkv.bias")),
        ("7.weight", TensorPlace("", -1, "7")),
        ("0.weight.scale", TensorPlace("", 0, "weight.scale")),
    ],
)
def test_a_name_has_a_place(name, place):
    assert place_of(name) == place
