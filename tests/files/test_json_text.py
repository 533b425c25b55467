"""JSON as every reader reads it, and nothing else."""

import json
import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.files.json_text import MAX_DEPTH, parse_json

REFUSED = {
    "a byte order mark": (b'\xef\xbb\xbf{"a": 1}', "BOM"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "decode"),
    "bytes that are no UTF-8": (b'{"a": "\xff"}', "decode"),
    "an overlong zero": (b'{"a": "\xc0\x80"}', "decode"),
    "half a surrogate pair as a key": (rb'{"\ud800": 1}', "unpaired surrogate"),
    "half a surrogate pair as a value": (rb'{"a": ["\uDFFF"]}', "unpaired surrogate"),
    "the halves of a pair the wrong way": (rb'"\udc00\ud800"', "unpaired surrogate"),
    "a key twice": (b'{"a": {"b": 1, "b": 1}}', "duplicate key 'b'"),
    "a key twice in two spellings": (rb'{"a": 1, "\u0061": 2}', "duplicate key 'a'"),
    "a key twice that clears the screen": (rb'{"\u001b[2J": 1, "\u001b[2J": 2}', r"duplicate key '\\x1b\[2J'"),
    "NaN": (b"[NaN]", "NaN is not valid JSON"),
    "an infinity": (b"[-Infinity]", "-Infinity is not valid JSON"),
    "a number that no float holds": (b"[1e999]", "exceeds the supported range"),
    "an integer that no float holds": (b"[" + b"9" * 301 + b"]", "301 digits"),
    "an integer that Python would not read": (b"[" + b"9" * 5000 + b"]", "5000 digits"),
    "lists in lists": (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "nested too deeply"),
    "objects in objects": (b'{"a":' * 100 + b"1" + b"}" * 100, "nested too deeply"),
    "a hundred thousand lists": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "an open list": (b"[", "Expecting value"),
    "two values": (b"{} {}", "Extra data"),
    "nothing": (b"", "Expecting value"),
    "a control character": (b'["\x1b"]', "Invalid control character"),
    "a comment": (b"{} // no", "Extra data"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_readers_could_read_differently_is_refused(what):
    text, why = REFUSED[what]
    with pytest.raises(ValueError, match=why):
        parse_json(text)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False))
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    ),
    max_leaves=12,
)


@given(values, st.booleans())
@settings(max_examples=75, deadline=None, derandomize=True)
def test_what_is_written_is_read(value, ascii_only):
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def test_a_pair_of_surrogates_is_one_character():
    assert parse_json(rb'["\ud83d\ude00"]') == ["\U0001f600"]


def test_the_deepest_allowed_is_read():
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)


def test_infinities_pass_where_they_are_let():
    low, high, none = parse_json(b"[-Infinity, Infinity, NaN]", infinities=True)
    assert (low, high) == (-math.inf, math.inf)
    assert math.isnan(none)
    assert parse_json(str(sys.float_info.max).encode()) == sys.float_info.max
