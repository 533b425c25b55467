"""The fleet's file: every problem at once, with its line and key."""

import re

import pytest

from portllm.errors import FleetFileError
from portllm.fleets.file import read_fleet_file

GOOD = """\
patches = ["a"]
evolved = ["v2"]
do = ["merge", "port"]
output = "out"

[merge]
dtype = "F32"
"""


@pytest.fixture
def read(tmp_path):
    def run(text):
        (tmp_path / "fleet.toml").write_text(text)
        return read_fleet_file(tmp_path / "fleet.toml")

    return run


def test_steps_are_in_the_order_in_which_they_are_done(read):
    assert read(GOOD).steps == ("port", "merge")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"F32"', '"BF8"', "line 7, merge.dtype: is 'BF8'; expected 'F64' or 'F32' or 'F16' or 'BF16'."),
        ("dtype", "dtyp", "line 7, merge.dtyp: unknown key. Did you mean dtype?"),
        ("evolved", "evolve", "line 2, evolve: unknown key. Did you mean evolved?"),
        ('output = "out"\n', "", "fleet.toml', output: is required."),
        (
            '["v2"]',
            '"v2"',
            "line 2, evolved: is 'v2'; expected a list, each a text that is not empty and has no NUL",
        ),
        (
            '["v2"]',
            "[]",
            "line 2, evolved: is the list []; expected a list, each a text that is not empty and has no NUL",
        ),
        (
            '["v2"]',
            '["v2", "v2"]',
            "line 2, evolved: is the list ['v2', 'v2']; expected a list, each a text that is not empty and has no NUL",
        ),
        ('["a"]', "[3]", "line 1, patches: is the list [3]; expected a list, each a text"),
        (
            '"port"]',
            '"fly"]',
            "line 3, do: is the list ['merge', 'fly']; expected a list, each 'check' or 'port' or 'merge'; one or",
        ),
        (
            '["merge", "port"]',
            '["merge", "check"]',
            "line 3, do: check compares evolved models with their base: base is required",
        ),
        ('["merge", "port"]', '["port"]', 'line 6, merge: has options, but do = ["port"] does not merge'),
        ("[merge]", '[port]\nmethod = "magic"\n[merge]', "line 7, port.method: unknown port method 'magic'"),
        ("[merge]", '[port]\nmethod = "align"\n[merge]', "line 7, port.method: port method 'align' needs prompts"),
        (
            "[merge]",
            "[merge]\nmax_shard_size = 0",
            "line 7, merge.max_shard_size: is 0; expected a number, 0.001 or more.",
        ),
        (
            '"out"',
            "2020-01-01\n",
            "line 4, output: is datetime.date(2020, 1, 1); expected a text that is not empty and has no NUL.",
        ),
        ("[merge]", "[merge", "is not valid TOML: Expected ']' at the end of a table declaration (at line 6"),
    ],
)
def test_a_problem_is_told_with_its_line_and_key(read, old, new, told):
    with pytest.raises(FleetFileError, match=re.escape(told)):
        read(GOOD.replace(old, new))


def test_every_problem_is_told_at_once(read):
    text = GOOD.replace('"F32"', '"BF8"').replace('["a"]', "[]") + 'seed = "one"\nspeed = 3\n'
    with pytest.raises(FleetFileError) as refused:
        read(text)
    keys = re.findall(r"line (\d+), ([\w.]+):", str(refused.value))
    assert sorted(keys) == [("1", "patches"), ("7", "merge.dtype"), ("8", "merge.seed"), ("9", "merge.speed")]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FleetFileError, match="nowhere.toml': cannot be read"):
        read_fleet_file(tmp_path / "nowhere.toml")
