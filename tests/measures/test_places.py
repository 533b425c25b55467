"""Places of tensors, from their names."""

import pytest

from portllm.measures.places import Place, place_of


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("transformer.h.11.attn.c_attn.weight", Place("transformer.h", 11, "attn.c_attn")),
        ("layers.0.mlp.up_proj.weight", Place("layers", 0, "mlp.up_proj")),
        ("model.layers.2.mlp.experts.gate_up_proj", Place("model.layers", 2, "mlp.experts.gate_up_proj")),
        ("model.layers.2.mlp.experts.5.w1.weight", Place("model.layers", 2, "mlp.experts.w1", is_expert=True)),
        ("model.norm.weight", Place("", -1, "model.norm")),
        ("lm_head.weight", Place("", -1, "lm_head")),
        ("visual.blocks.3.attn.qkv.bias", Place("visual.blocks", 3, "attn.qkv.bias")),
        ("7.weight", Place("", -1, "7")),
        ("0.weight.scale", Place("", 0, "weight.scale")),
    ],
)
def test_a_name_has_a_place(name, place):
    assert place_of(name) == place
