"""Configurations and keys for deltas and values that never were an adapter."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.patch.adapter_config import parse_adapter_config
from portllm.patch.new_adapter import canonical_config, place_values

LLAMA = (
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.k_proj.bias",
    "model.norm.weight",
    "lm_head.weight",
)
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def place(*changed, tensors=LLAMA, targets=(Q,), tied=None):
    return place_values(changed, tensors=tensors, targets=targets, tied=tied)


@given(
    ranks=st.dictionaries(
        st.from_regex(r"\A(x\.)?layers\.1?[0-9]\.(q|k|q_q|q\+)\Z"), st.integers(1, 4), min_size=1, max_size=9
    )
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_module_gets_its_rank_and_scale_one(ranks):
    config = parse_adapter_config(canonical_config(ranks), where="new")
    assert {module: config.rank_of(module) for module in ranks} == ranks
    assert {config.scale_of(module) for module in ranks} == {1.0}


def test_a_pattern_means_one_module_and_no_other_that_ends_alike():
    config = parse_adapter_config(canonical_config({"h.q": 2, "x.h.q": 4, "y.h.q": 4}), where="new")
    assert (config.rank_of("x.h.q"), config.rank_of("h.q"), config.rank_of("x.hzq")) == (4, 2, 4)


def test_the_patterns_mean_the_same_to_peft():
    from peft.utils.other import get_pattern_key

    patterns = canonical_config({"h.q": 2, "x.h.q": 4, "y.h.q": 4})["rank_pattern"]
    assert get_pattern_key(patterns, "h.q") == "^" + re.escape("h.q")
    assert get_pattern_key(patterns, "x.h.q") not in patterns


def test_modules_are_named_in_full_and_in_order():
    assert canonical_config({"b.q": 1, "a.q": 1})["target_modules"] == ["a.q", "b.q"]


def test_a_norm_is_saved_whole_under_its_full_name():
    placed = place("model.norm.weight")
    assert dict(placed.keys) == {"base_model.model.model.norm.weight": "model.norm.weight"}
    assert placed.fields == {"modules_to_save": ["model.norm"]}


def test_a_name_that_is_the_end_of_another_is_left_out():
    placed = place("norm.weight", tensors=("norm.weight", "h.0.norm.weight"))
    assert "h.0.norm" in placed.left_out["norm.weight"]
    assert placed.fields == {}


def test_a_bias_of_a_patched_module_goes_with_it():
    placed = place(f"{Q}.bias")
    assert dict(placed.keys) == {f"base_model.model.{Q}.base_layer.bias": f"{Q}.bias"}
    assert placed.fields == {"bias": "lora_only"}


def test_a_bias_of_another_module_goes_alone():
    placed = place(f"{Q}.bias", f"{K}.bias")
    assert f"base_model.model.{K}.bias" in placed.keys
    assert placed.fields == {"bias": "all"}


def test_a_norm_with_a_bias_brings_both():
    tensors = ("h.norm.weight", "h.norm.bias")
    placed = place("h.norm.weight", tensors=tensors)
    assert sorted(placed.keys.values()) == sorted(tensors)


def test_a_tied_embedding_is_stored_for_the_head_too():
    placed = place("model.embed_tokens.weight", tied="model.embed_tokens.weight")
    assert placed.keys["base_model.model.lm_head.weight"] == "model.embed_tokens.weight"
    assert placed.fields == {"modules_to_save": ["model.embed_tokens"], "ensure_weight_tying": True}


@pytest.mark.parametrize("name", ["model.layers.0.mixer.A_log", "weight", f"{Q}.weight"])
def test_what_peft_cannot_load_is_left_out_with_the_reason(name):
    placed = place(name, tensors=(*LLAMA, name))
    assert set(placed.left_out) == {name}
    assert "PEFT" in placed.left_out[name]


def test_a_whole_module_around_a_delta_is_left_out():
    placed = place("model.weight", tensors=(*LLAMA, "model.weight"))
    assert Q in placed.left_out["model.weight"]
