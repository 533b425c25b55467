"""What changed in `config.json`, whatever version of transformers wrote it."""

import pytest

from portllm.checking.update.config_changes import Effect, compare_configs

LLAMA_3 = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
LLAMA_3_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "rope_type": "llama3"}


def fields(base, evolved):
    return {change.field: (change.base, change.evolved) for change in compare_configs(base, evolved)}


def test_the_same_configuration_has_no_changes():
    assert compare_configs(LLAMA_3, dict(LLAMA_3)) == ()


def test_dates_dtypes_and_names_do_not_count():
    assert (
        fields(LLAMA_3, {**LLAMA_3, "torch_dtype": "float16", "transformers_version": "5", "_name_or_path": "x"}) == {}
    )


def test_an_update_of_positions_is_one():
    evolved = {**LLAMA_3, "rope_scaling": LLAMA_3_SCALING, "max_position_embeddings": 131072}
    changes = compare_configs(LLAMA_3, evolved)
    assert {change.field for change in changes} == {"rope scaling", "context length"}
    assert {change.effect for change in changes} == {Effect.POSITION}


@pytest.mark.parametrize("scaling", [None, LLAMA_3_SCALING])
def test_what_transformers_5_writes_of_rope_is_the_same(scaling):
    old = {**LLAMA_3, "rope_scaling": scaling}
    new = {name: value for name, value in LLAMA_3.items() if not name.startswith("rope")}
    new["rope_parameters"] = {"rope_type": "default", **(scaling or {}), "rope_theta": 500000.0}
    assert fields(old, new) == {}


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("hidden_act", "gelu", "activation"),
        ("num_key_value_heads", 4, "key heads"),
        ("model_type", "qwen2", "architecture"),
        ("sliding_window", 4096, "sliding window"),
    ],
)
def test_another_function_of_the_same_weights_is_told(field, value, told):
    (change,) = compare_configs(LLAMA_3, {**LLAMA_3, field: value})
    assert (change.field, change.effect) == (told, Effect.FUNCTION)


def test_a_field_that_only_one_version_writes_is_no_change():
    assert fields(LLAMA_3, {**LLAMA_3, "head_dim": 128, "rms_norm_eps": 1e-5}) == {}


def test_the_part_about_text_speaks_for_the_text():
    base, evolved = ({"text_config": {**LLAMA_3, "vocab_size": n}} for n in (10, 12))
    assert fields(base, evolved) == {"vocabulary size": (10, 12)}


def test_a_model_without_a_configuration_has_no_changes():
    assert compare_configs({}, LLAMA_3) == ()
