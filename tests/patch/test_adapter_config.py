"""PEFT's configuration: matching and scales against PEFT itself, and every field that is not understood."""

import dataclasses
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.errors import AdapterFormatError
from portllm.patch import name_pattern
from portllm.patch.adapter_config import (
    IGNORED_FIELDS,
    NEUTRAL_VALUES,
    UNDERSTOOD_FIELDS,
    parse_adapter_config,
)
from portllm.patch.adapter_start import INIT_CONFIGS

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}

MODULES = (
    *(
        f"model.layers.{layer}.{part}"
        for layer in (0, 1, 10)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.experts.2.w1")
    ),
    *(f"transformer.h.{layer}.attn.c_attn" for layer in (0, 1)),
    "vision.blocks.1.attn.qkv_proj",
    "layers.0.q_proj",
    "h.1.w1",
    "q_proj",
    "xq_proj",
    "lm_head",
    "score",
)
ENDINGS = ("q_proj", "self_attn.q_proj", "layers.0.self_attn.k_proj", "_proj", "w1", "c_attn", "lm_head", MODULES[2])
EXPRESSIONS = (
    ".*",
    r".*\.q_proj",
    "q_proj",
    r"model\.layers\.(0|10)\..*_proj",
    "model.layers.1.mlp.up_proj",
    r".*(k|o)_proj$",
    "",
)
PATTERNS = (
    "q_proj",
    "k_proj|o_proj",
    "up.proj",
    "^q_proj",
    r"layers\.0\..*",
    "layers.1.self_attn.q_proj",
    ".*_proj",
    "proj",
    "w1",
    *MODULES[:2],
)
NUMBERS = (None, [], [0], [1, 10], 0, 1, 2, [2])
LAYERS = (None, "", [], "layers", "h", ["h", "layers"], ["blocks"], "layer.", r"mod\w+\.layers")

lists = st.lists(st.sampled_from(ENDINGS), max_size=3)
chosen = st.one_of(lists, st.sampled_from(EXPRESSIONS))
values = st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 9), max_size=4)


SAVED = (None, [], ["q_proj"], ["mlp"], ["proj"], ["lm_head", "score"], ["layers.1"], ["k_pro."], ["experts.2"])


@given(chosen, st.one_of(st.none(), chosen), st.sampled_from(NUMBERS), st.sampled_from(LAYERS), st.sampled_from(SAVED))
@settings(max_examples=160, deadline=None, derandomize=True)
def test_the_same_modules_are_named_as_by_peft(targets, excluded, numbers, layers, saved):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    if isinstance(targets, str):  # PEFT takes layer numbers with a list only
        numbers = layers = None
    if not numbers and numbers != 0:
        layers = None
    fields = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": numbers,
        "layers_pattern": layers,
        "modules_to_save": saved,
    }
    theirs = LoraConfig(**fields)
    ours = parse_adapter_config({**PLAIN, **fields}, where="adapter")
    assert ours.targets(MODULES) == [module for module in MODULES if check_target_module_exists(theirs, module)]


@given(values, values, st.booleans(), st.integers(1, 64), st.one_of(st.integers(1, 64), st.floats(0.5, 64)))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_rank_and_scale_are_those_of_peft(ranks, alphas, stabilized, rank, alpha):
    from peft.utils.other import get_pattern_key

    fields = {"r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": stabilized}
    ours = parse_adapter_config({**PLAIN, **fields}, where="adapter")
    for module in MODULES:
        their_rank = ranks.get(get_pattern_key(ranks.keys(), module), rank)
        their_alpha = alphas.get(get_pattern_key(alphas.keys(), module), alpha)
        assert ours.rank_of(module) == their_rank
        assert ours.scale_of(module) == their_alpha / (math.sqrt(their_rank) if stabilized else their_rank)


def test_scales_of_a_model_in_peft_are_ours(tiny):
    from tests.models import load_tuned

    adapter = tiny(
        "adapter",
        use_rslora=True,
        r=3,
        lora_alpha=7,
        rank_pattern={r"layers\.0\..*": 2, "up_proj": 5},
        alpha_pattern={"up_proj": 11, "layers.1.self_attn.q_proj": 2},
    )
    ours = parse_adapter_config(json.loads((adapter / "adapter_config.json").read_text()), where="adapter")
    theirs = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in load_tuned(tiny("base"), adapter).named_modules()
        if hasattr(module, "lora_A")
    }
    assert len(theirs) == 14
    assert {name: (ours.rank_of(name), ours.scale_of(name)) for name in theirs} == theirs
    assert len(set(theirs.values())) == 5


def test_every_field_of_peft_is_accounted_for_once():
    from peft import LoraConfig

    known = [*IGNORED_FIELDS, *NEUTRAL_VALUES, *UNDERSTOOD_FIELDS]
    assert len(known) == len(set(known))
    assert {field.name for field in dataclasses.fields(LoraConfig)} - {"runtime_config"} <= set(known)


def test_a_plain_configuration_as_peft_saves_it_is_accepted(tmp_path):
    from peft import LoraConfig

    LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    parsed = parse_adapter_config(fields, where="adapter")
    assert (parsed.rank_of("q_proj"), parsed.scale_of("q_proj")) == (4, 1.5)
    assert parsed.fields == fields


@pytest.mark.parametrize("word", ["all-linear", "ALL-Linear"])
def test_all_linear_leaves_the_head_out(word):
    config = parse_adapter_config({**PLAIN, "target_modules": word}, where="adapter")
    modules = [*MODULES, "model.embed_tokens", "transformer.wte", "transformer.wpe"]
    assert config.targets(modules) == [module for module in MODULES if module not in ("lm_head", "score")]


def test_alpha_has_pefts_default():
    fields = {name: value for name, value in PLAIN.items() if name != "lora_alpha"}
    assert parse_adapter_config(fields, where="adapter").scale_of("q_proj") == 8 / 4


@pytest.mark.parametrize("kind", ["LOHA", "IA3", "lora", None, 1])
def test_another_kind_of_adapter_is_refused_by_its_name(kind):
    with pytest.raises(AdapterFormatError, match=f"'mine': its peft_type is {kind!r}; only 'LORA'"):
        parse_adapter_config({**PLAIN, "peft_type": kind}, where="mine")


FOREIGN = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1},
    "layer_replication": [[0, 2], [1, 2]],
    "megatron_config": {"a": 1},
    "monteclora_config": {"a": 1},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"a": 1},
}


def test_there_is_an_example_of_each_foreign_field():
    assert set(FOREIGN) == set(NEUTRAL_VALUES)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_kind_of_adapter_that_is_not_supported_is_refused_by_its_field(name):
    with pytest.raises(AdapterFormatError, match=f"'mine': .*'{name}' is .*this kind of adapter is not supported"):
        parse_adapter_config({**PLAIN, name: FOREIGN[name]}, where="mine")


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in NEUTRAL_VALUES for value in NEUTRAL_VALUES[name]]
)
def test_a_foreign_field_that_says_no_is_accepted(name, value):
    assert parse_adapter_config({**PLAIN, name: value}, where="mine").fields[name] == value


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_a_start_that_changes_the_base_is_known(how):
    assert parse_adapter_config({**PLAIN, "init_lora_weights": how}, where="mine").changed_base == how.lower()


@pytest.mark.parametrize("name", INIT_CONFIGS)
def test_settings_of_a_start_tell_of_it_though_the_start_is_not_named(name):
    assert parse_adapter_config({**PLAIN, name: {"a": 1}}, where="mine").changed_base == INIT_CONFIGS[name]
    for nothing in (None, {}):
        assert parse_adapter_config({**PLAIN, name: nothing}, where="mine").changed_base is None


@pytest.mark.parametrize("how", [True, False, None, "gaussian", "Gaussian", "orthogonal", "eva", "mica"])
def test_a_start_that_leaves_the_base_as_it_was_is_accepted(how):
    assert parse_adapter_config({**PLAIN, "init_lora_weights": how}, where="mine").changed_base is None


@pytest.mark.parametrize("how", ["new", "pissa_niter_x", "pissa2", "kasa", 2, ["pissa"], {}])
def test_a_start_that_is_not_known_is_refused(how):
    with pytest.raises(AdapterFormatError, match="'init_lora_weights' is .* whether that changes the base is unknown"):
        parse_adapter_config({**PLAIN, "init_lora_weights": how}, where="mine")


def test_every_start_that_peft_documents_is_known():
    from peft import LoraConfig

    (field,) = (field for field in dataclasses.fields(LoraConfig) if field.name == "init_lora_weights")
    named = set(re.findall(r"'([^']+)'", str(field.type)))
    assert {"gaussian", "eva", "olora", "pissa", "corda", "loftq"} <= named
    for how in named - {"pissa_niter_[number of iters]"}:
        parse_adapter_config({**PLAIN, "init_lora_weights": how}, where="mine")


@pytest.mark.parametrize("value", [True, 0.5, "yes", {"a": 1}, [1]])
def test_a_field_that_nobody_knows_is_refused(value):
    with pytest.raises(AdapterFormatError, match="unknown field 'use_newest'"):
        parse_adapter_config({**PLAIN, "use_newest": value}, where="mine")


TAKEN = {
    "bias": (None, "none", "all", "lora_only"),
    "ensure_weight_tying": (None, False, True),
    "fan_in_fan_out": (None, False, True),
    "lora_bias": (None, False, True),
    "modules_to_save": (None, [], ["lm_head", "embed_tokens"]),
    "trainable_token_indices": (None, [], [3, 5], {"embed_tokens": [3], "lm_head": []}),
    "use_dora": (None, False, True),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in TAKEN for value in TAKEN[name]])
def test_every_value_of_a_field_that_is_understood_is_accepted(name, value):
    assert parse_adapter_config({**PLAIN, name: value}, where="mine").fields[name] == value


def test_by_hand_the_token_rows_of_a_module():
    one = parse_adapter_config({**PLAIN, "trainable_token_indices": [5, 3]}, where="mine")
    assert one.token_rows_of("model.embed_tokens") == one.token_rows_of("lm_head") == (5, 3)
    fields = {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [1]}}
    each = parse_adapter_config({**PLAIN, **fields}, where="mine")
    found = [each.token_rows_of(module) for module in ("model.embed_tokens", "lm_head", "x.xembed_tokens")]
    assert found == [(5, 3), (1,), ()]


@pytest.mark.parametrize("value", [None, False])
def test_a_field_that_nobody_knows_and_that_says_no_is_accepted(value):
    parse_adapter_config({**PLAIN, "use_newest": value}, where="mine")


WRONG = [
    ("r", 0), ("r", -1), ("r", 2.0), ("r", True), ("r", "4"), ("r", None), ("r", 2**31),
    ("lora_alpha", "6"), ("lora_alpha", True), ("lora_alpha", None), ("lora_alpha", math.nan), ("lora_alpha", math.inf),
    ("lora_alpha", 10**400),
    ("rank_pattern", ["q_proj"]), ("rank_pattern", {"q_proj": 0}), ("rank_pattern", {"q_proj": 1.5}),
    ("rank_pattern", {"q_proj": True}), ("rank_pattern", {"q_proj": 10**200}),
    ("alpha_pattern", ["q_proj"]), ("alpha_pattern", {"q_proj": "1"}), ("alpha_pattern", {"q_proj": True}),
    ("alpha_pattern", {"q_proj": math.inf}), ("alpha_pattern", {"q_proj": math.nan}),
    ("use_rslora", 1), ("use_rslora", "true"),
    ("target_parameters", "w1"), ("target_modules", [1]), ("target_modules", {"q_proj": 1}), ("target_modules", True),
    ("exclude_modules", True), ("exclude_modules", [1]), ("exclude_modules", {"q_proj": 1}),
    ("layers_to_transform", "1"), ("layers_to_transform", [1.0]), ("layers_to_transform", True),
    ("layers_to_transform", [True]),
    ("layers_pattern", True), ("layers_pattern", 1), ("layers_pattern", [1]),
    ("bias", True), ("bias", "lora"), ("bias", ["all"]),
    ("modules_to_save", "lm_head"), ("modules_to_save", [1]), ("modules_to_save", {"lm_head": 1}),
    ("trainable_token_indices", 3), ("trainable_token_indices", True), ("trainable_token_indices", [-1]),
    ("trainable_token_indices", [1.0]), ("trainable_token_indices", [True]), ("trainable_token_indices", ["a"]),
    ("trainable_token_indices", {"embed_tokens": 3}), ("trainable_token_indices", {"embed_tokens": [-3]}),
    ("use_dora", 1), ("lora_bias", "yes"), ("fan_in_fan_out", 0.5), ("ensure_weight_tying", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_of_another_type_is_refused(name, value):
    with pytest.raises(AdapterFormatError, match=f"'{name}' is .*which has the wrong type"):
        parse_adapter_config({**PLAIN, name: value}, where="mine")


BROKEN = [
    ("target_modules", "(q_proj"),
    ("exclude_modules", "*"),
    ("layers_pattern", "["),
    ("layers_pattern", ["layers", "(?i)h"]),
    ("rank_pattern", {"q_proj": 2, "(": 3}),
    ("rank_pattern", {"(?i)q_proj": 2}),
    ("alpha_pattern", {"q)": 2}),
    ("modules_to_save", ["lm_head", "(norm"]),
]


@pytest.mark.parametrize(("name", "value"), BROKEN)
def test_a_broken_expression_is_refused(name, value):
    with pytest.raises(AdapterFormatError, match=f"'{name}' contains .*which is not a valid regular expression"):
        parse_adapter_config({**PLAIN, name: value}, where="mine")


def test_names_in_lists_are_no_expressions():
    config = parse_adapter_config(
        {**PLAIN, "target_modules": ["(q", "q.proj"], "exclude_modules": ["*"]}, where="adapter"
    )
    assert config.targets(["q_proj", "x.q_proj"]) == []


@pytest.mark.parametrize("name", ["r", "target_modules"])
def test_a_missing_field_is_named(name):
    with pytest.raises(AdapterFormatError, match=f"'{name}' is missing"):
        parse_adapter_config({key: value for key, value in PLAIN.items() if key != name}, where="mine")


def test_all_problems_are_named_at_once():
    fields = {"peft_type": "LORA", "r": 0, "use_bdlora": {}, "new": 1, "bias": "x", "init_lora_weights": "magic"}
    with pytest.raises(AdapterFormatError) as refused:
        parse_adapter_config(fields, where="mine")
    message = str(refused.value)
    assert message.startswith("'mine': adapter_config.json is not fully supported: ")
    named = ["'bias'", "'init_lora_weights'", "'new'", "'r'", "'use_bdlora'", "'target_modules' is missing"]
    assert [name for name in named if name in message] == named


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(AdapterFormatError) as refused:
        parse_adapter_config({**PLAIN, "kasa_config": ["x" * 1000]}, where="mine")
    assert len(str(refused.value)) < 250


SLOW = "(a|aa)+$"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_an_expression_that_takes_too_long_to_match_a_name_is_refused(field, monkeypatch):
    monkeypatch.setattr(name_pattern, "MATCH_SECONDS", 0.05)
    config = parse_adapter_config({**PLAIN, field: {SLOW: 3} if field.endswith("_pattern") else SLOW}, where="mine")
    hostile = "a" * 60 + "!"
    with pytest.raises(AdapterFormatError, match=r"'\(a\|aa\)\+\$' takes more than 0.05 s to match the name 'aaa"):
        {"rank_pattern": config.rank_of, "alpha_pattern": config.scale_of}.get(
            field, lambda name: config.targets([name])
        )(hostile)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_what_pythons_engine_matches_forever_is_known_of_the_modules_of_a_model(field, monkeypatch):
    modules = [f"model.layers.{number}.self_attn.q_proj" for number in range(8)]

    def is_long(pattern):
        value = {pattern: 3} if field.endswith("_pattern") else pattern
        return parse_adapter_config({**PLAIN, field: value}, where="mine").takes_peft_long(modules)

    assert not is_long(r".*\.(q|k)_proj")
    assert not is_long(r"model(\.\w+)*\.q_proj")
    monkeypatch.setattr(name_pattern, "TRIAL_SECONDS", 0.3)  # forever is longer than any time
    assert is_long(r"(.*[a-z]){30}!")


def test_a_configuration_of_names_is_matched_without_another_process(monkeypatch):
    monkeypatch.setattr(name_pattern.subprocess, "run", None)
    assert not parse_adapter_config({**PLAIN, "rank_pattern": {"q_proj": 2}}, where="mine").takes_peft_long(["q_proj"])


def test_the_expression_of_a_list_of_layers_is_bounded_in_time_too(monkeypatch):
    monkeypatch.setattr(name_pattern, "MATCH_SECONDS", 0.05)
    fields = {**PLAIN, "target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "(a|aa)+"}
    with pytest.raises(AdapterFormatError, match=r"takes more than 0.05 s"):
        parse_adapter_config(fields, where="mine").targets(["h." + "a" * 60 + ".x.q"])


def test_more_names_than_can_be_compared_with_the_modules_are_refused():
    names = [f"layers.{number}.q_proj" for number in range(20_000)]
    config = parse_adapter_config({**PLAIN, "target_modules": names}, where="mine")
    assert config.targets(names[:1]) == names[:1]
    with pytest.raises(AdapterFormatError, match="'target_modules' has 20000 entries, too many to match against"):
        config.targets(names)


OLDEST = {
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
"""All fields of a configuration of PEFT 0.2: two of them are gone since, and most of today's are missing."""


def test_a_configuration_of_the_first_versions_of_peft_means_what_it_meant():
    config = parse_adapter_config(OLDEST, where="mine")
    assert config.targets(["h.0.q_proj", "h.0.k_proj"]) == ["h.0.q_proj"]
    assert (config.rank_of("h.0.q_proj"), config.scale_of("h.0.q_proj"), config.changed_base) == (8, 2.0, None)
    for gone in ("enable_lora", "merge_weights"):  # true where weights were merged or only some outputs adapted
        with pytest.raises(AdapterFormatError, match=gone):
            parse_adapter_config({**OLDEST, gone: [True, False, True]}, where="mine")
