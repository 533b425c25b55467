"""Seals: what they cover, what they do not, and that no single byte of a sealed file can change unnoticed."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.files.seal import SEAL, digest_file, render_sealed, seal_of, seal_problem

values = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@given(values)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_written_sealed_is_read_with_a_seal_that_fits(said):
    read = json.loads(render_sealed(said))
    assert seal_problem(read) is None
    assert {key: value for key, value in read.items() if key != SEAL} == {k: v for k, v in said.items() if k != SEAL}
    assert render_sealed(read) == render_sealed(said)


def test_the_seal_does_not_depend_on_the_order_of_keys():
    assert seal_of({"a": {"x": 1, "y": 2}, "b": 0}) == seal_of({"b": 0, "a": {"y": 2, "x": 1}})


def test_by_hand_numbers_as_keys_and_tuples_are_sealed_as_they_will_be_read():
    assert seal_problem(json.loads(render_sealed({"ranks": {10: (1, 2), 9: []}}))) is None


def test_a_missing_seal_and_one_of_other_values_are_problems():
    read = json.loads(render_sealed({"a": 1}))
    assert seal_problem({"a": 1}) is not None
    assert seal_problem({**read, "a": 2}) is not None
    assert seal_problem({**read, "b": 2}) is not None
    assert seal_problem({**read, "a": 1.0}) is not None


def test_the_digest_of_a_file_is_that_of_the_public_tool(tmp_path):
    # `printf abc | b3sum`
    (tmp_path / "file").write_bytes(b"abc")
    assert digest_file(tmp_path / "file") == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
