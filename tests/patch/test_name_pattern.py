"""Patterns of names: the answers of Python's own engine, and none that takes long."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.errors import AdapterFormatError
from portllm.patch import name_pattern
from portllm.patch.name_pattern import NamePattern, takes_python_long

ATOMS = (
    "a", "b", r"\.", "[ab]", "[^a]", r"\w", ".", "^", "$", r"\b", r"\B", "(?=a)", "(?!b)", "(?<=a)", "(?<!ab)", "x{}",
    r"\d", "(?>a*)", "",
)  # fmt: skip
REPEATS = ("*", "+", "?", "{0,2}", "{2}", "{1,}", "*?", "+?", "??", "++", "{,2}")
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


NAMES = st.text("abAB._{}", min_size=1, max_size=6)


@given(patterns, st.lists(NAMES, min_size=1, max_size=4))
@settings(max_examples=160, deadline=None, derandomize=True)
def test_names_are_matched_as_pythons_engine_matches_them(text, names):
    for name in names:
        for whole, python in ((True, re.fullmatch), (False, re.match)):
            try:
                expected = python(text, name)
            except SystemError:  # a fault of Python's engine, which it reports itself
                continue
            found = _pattern(text, whole=whole).match(name)
            assert (found and found.span()) == (expected and expected.span())


def _pattern(text, *, whole=True):
    """A pattern that can be used."""
    pattern = NamePattern(text, whole=whole)
    assert pattern.problem() is None
    return pattern


QUICK = {
    "(a+)+$": ("a" * 60 + "!", False),
    "(a?){50}a{50}": ("a" * 50, True),
    "(.*a){25}": ("a" * 24 + "b" * 40, False),
    ".*.*.*.*.*.*.*.*x": ("a" * 60, False),
    r"model(\.\w+)*\.q_proj": ("model.layers.0.self_attn.q_proj", True),
}


@pytest.mark.parametrize("text", QUICK)
def test_what_can_be_matched_in_time_is_answered(text):
    name, expected = QUICK[text]
    assert (_pattern(text).match(name) is not None) == expected


def test_what_cannot_be_matched_in_time_is_refused(monkeypatch):
    monkeypatch.setattr(name_pattern, "MATCH_SECONDS", 0.05)
    with pytest.raises(AdapterFormatError, match="takes more than 0.05 s to match the name 'aaa"):
        _pattern("(a|aa)+$").match("a" * 60 + "!")


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
    pattern = _pattern(text)
    names = ("model.language_model.layers.10.self_attn.q_proj", "q_proj", "visual.blocks.1.mlp.fc1", "model.norm")
    assert not takes_python_long([pattern], names)
    for name in names:
        assert (pattern.match(name) is not None) == (re.fullmatch(text, name) is not None)


@pytest.mark.parametrize(
    ("text", "why"),
    {
        "(": "not a valid regular expression",
        "[": "not a valid regular expression",
        "(" * 5000: "not a valid regular expression",
        "a{99999999999}": "not a valid regular expression",
        "a" * 100_001: "100001 characters",
        "(a{200}){200}(a+)+": "could take long",
        "(?:){0,4000000000}(a+)+": "could take long",
        "((){9999}){9999}((){9999}){0,9999}(a*)*": "could take long",
        "(?:q_proj){e<=1}": "not all engines read alike",
        "(?:q_proj){1<=e<=2:[a-z]}": "not all engines read alike",
        "[[:alpha:]]+": "not all engines read alike",
        r"\p{L}": "not a valid regular expression",
        "(?R)?": "not a valid regular expression",
    }.items(),
    ids=range(13),
)
def test_a_pattern_that_cannot_be_bounded_or_means_two_things_is_refused(text, why):
    assert why in NamePattern(text).problem()


def test_a_nested_set_of_the_future_is_read_without_a_warning():
    assert _pattern("[[a]").match("[")
