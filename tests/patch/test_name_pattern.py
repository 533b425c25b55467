"""Patterns of names: the answers of Python's own engine, and none that takes long."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.patch import name_pattern
from portllm.patch.name_pattern import BEARABLE_WAYS, compile_pattern

ATOMS = ("a", "b", r"\.", "[ab]", "[^a]", r"\w", ".", "^", "$", r"\b", r"\B", "(?=a)", "(?!b)", "(?<=a)", "(?<!ab)", "")
REPEATS = ("*", "+", "?", "{0,2}", "{2}", "{1,}", "*?", "+?")
patterns = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(REPEATS)).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        inner.map(lambda one: f"(?i:{one})"),
    ),
    max_leaves=8,
)


@given(patterns, st.lists(st.text("abAB.\n", max_size=6), min_size=1, max_size=4))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_all_states_at_once_match_what_pythons_engine_matches(text, names):
    parsed = re.compile(text)
    program = tuple(name_pattern._written([], name_pattern._parser.parse(text), parsed.flags, looks=0))
    forced = name_pattern.NamePattern(0, parsed, program)
    for name in names:
        assert forced.begins(name) == (parsed.match(name) is not None)
        assert forced.is_all_of(name) == (parsed.fullmatch(name) is not None)


CATASTROPHIC = {
    "(a+)+$": ("a" * 60 + "!", False),
    "(a|a)*b": ("a" * 60, False),
    "(a|aa)+$": ("a" * 60 + "!", False),
    "(a?){50}a{50}": ("a" * 50, True),
    "(.*a){25}": ("a" * 24 + "b" * 40, False),
    "(((a*)*)*)*b": ("a" * 60, False),
    ".*.*.*.*.*.*.*.*x": ("a" * 200, False),
    "(x+x+)+y": ("x" * 60, False),
    "(?=(a+)+$)a": ("a" * 60 + "!", False),
    r"^(([a-z])+.)+[A-Z]([a-z])+$": ("a" * 60, False),
}


@pytest.mark.parametrize("text", CATASTROPHIC)
def test_a_pattern_that_pythons_engine_tries_for_hours_is_answered(text):
    name, expected = CATASTROPHIC[text]
    assert compile_pattern(text).is_all_of(name) == expected


WRITTEN_BY_TRAINERS = (
    "q_proj",
    r".*\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r"^(?!.*visual).*(q_proj|k_proj)$",
    r"^(language_model(?=\.).*\.(q_proj|k_proj|v_proj))$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|out_proj|"
    r"fc1|fc2|gate_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|k_proj)))",
)


@pytest.mark.parametrize("text", WRITTEN_BY_TRAINERS)
def test_the_patterns_of_training_programs_are_matched_and_may_go_to_peft(text):
    found = compile_pattern(text)
    assert found.ways <= BEARABLE_WAYS
    for name in ("model.language_model.layers.10.self_attn.q_proj", "q_proj", "visual.blocks.1.mlp.fc1", "model.norm"):
        assert found.is_all_of(name) == (re.fullmatch(text, name) is not None)


@pytest.mark.parametrize(
    ("text", "why"),
    {
        "(": "not a valid regular expression",
        "[": "not a valid regular expression",
        "(" * 5000: "not a valid regular expression",
        "a{99999999999}": "not a valid regular expression",
        "a" * 100_001: "100001 characters",
        r"(a+)+\1": "could take long",
        "(a+)+(?>b)": "could take long",
        "(?=(?=(a+)+))a": "could take long",
        "(a{200}){200}(a+)+": "more than 10000 states",
        "(?:){0,4000000000}(a+)+": "more than 10000 states",
        "((){9999}){9999}((){9999}){0,9999}(a*)*": "more than 10000 states",
    }.items(),
    ids=range(11),
)
def test_a_pattern_that_cannot_be_bounded_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        compile_pattern(text)


def test_a_nested_set_of_the_future_is_read_without_a_warning():
    assert compile_pattern("[[a]").is_all_of("[")
