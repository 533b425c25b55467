"""Values of files become values of types, or every problem is told in its place, shortly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import pytest

from portllm.errors import PortLLMError
from portllm.files.record import Recorded, one_of
from portllm.files.typed import EACH_ONCE, decode, problems, read_table


class Point(Recorded, frozen=True, tag_field="format", tag=1):
    name: Annotated[str, one_of("a.b", "c")]
    at: Mapping[str, float]
    inside: tuple["Point", ...] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    size: int = 1
    seeds: Annotated[tuple[int, ...], EACH_ONCE] = (0,)

    def __post_init__(self):
        if self.size < 1:
            raise PortLLMError("size is below 1.")


GOOD = {"format": 1, "name": "c", "at": {"x": 1}}


def test_what_fits_is_a_value():
    assert decode(Point, {**GOOD, "inside": [GOOD]}) == Point("c", {"x": 1.0}, (Point("c", {"x": 1.0}),))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (3, "is 3; expected a table"),
        ({"name": "c", "at": {}}, "format: is required"),
        ({**GOOD, "format": True}, "format: is true; expected 1"),
        ({**GOOD, "name": "axb"}, "name: is 'axb'; expected 'a.b' or 'c'"),
        ({**GOOD, "name": "c\n"}, r"name: is 'c\n'; expected 'a.b' or 'c'"),
        ({**GOOD, "at": {"x": 1, "y": None}}, "at.y: is null; expected a number"),
        ({**GOOD, "at": "x" * 10**6}, f"at: is '{'x' * 79}...; expected a table"),
        ({**GOOD, "inside": [GOOD, {**GOOD, "nam": 1}]}, "inside.1.nam: unknown key. Did you mean name?"),
    ],
)
def test_the_first_problem_is_told_in_its_place(values, told):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the whole message is compared)
        decode(Point, values)
    assert str(refused.value) == told


def test_all_problems_are_told():
    found = dict(problems({"format": 2, "at": {"x": "1", "y": [True]}, "nam": 0}, Point))
    assert found == {
        ("format",): "is 2; expected 1",
        ("at", "x"): "is '1'; expected a number",
        ("at", "y"): "is the list [True]; expected a number",
        ("nam",): "unknown key. Did you mean name?",
        ("name",): "is required",
    }


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"size": 0}, [(("top",), "size is below 1")]),
        ({"size": "x", "seeds": [1, 1]}, [(("top", "size"), "is 'x'; expected an integer"), (
            ("top", "seeds"), "is the list [1, 1]; expected a list, each an integer; one or more, each once")]),
        ([], [(("top",), "is the list []; expected a table")]),
    ],
)  # fmt: skip
def test_of_a_table_that_is_wrong_all_is_told_and_nothing_made(table, told):
    found = []
    assert read_table(Table, table, ("top",), lambda path, problem: found.append((path, problem))) is None
    assert found == told


def test_a_table_that_is_right_is_made():
    assert read_table(Table, {"seeds": [3, 4]}, (), pytest.fail) == Table(seeds=(3, 4))
