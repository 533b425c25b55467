"""What this program kept for itself, damaged: it is made again, or refused by name; it is never believed."""

import json
import os

import pytest
from blake3 import blake3

from portllm.errors import FleetFileError
from portllm.files.kept_results import keep, read_record
from portllm.files.seal import render_sealed
from portllm.files.staging import FORMAT, Journal
from portllm.fleets.plan import FORMAT as STATE_FORMAT
from portllm.fleets.state import read_state
from portllm.study.run import IDENTITIES, study_identities

ODD = {
    "nothing": b"",
    "noise": b"\xff\xfe\x00",
    "null": b"null",
    "a number": b"5",
    "a list": b"[]",
    "an object": b"{}",
    "deep": b"[" * 100_000,
    "twice": b'{"inputs": 1, "inputs": 2}',
    "half a pair": rb'{"inputs": "\ud800"}',
    "other types": b'{"inputs": 5, "files": [], "seconds": "x", "result": null, "base": 5, "data": []}',
    "infinite": b'{"inputs": {}, "files": "f", "seconds": NaN, "result": {}}',
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_a_damaged_result_is_made_again(content, tmp_path):
    place = tmp_path / "kept.json"
    place.write_bytes(content)
    assert read_record(place) is None
    found = keep(place, inputs={"seed": 0}, identify=lambda: "files", work=lambda: {"loss": 1})
    assert (found.result, found.reused) == ({"loss": 1}, False)
    assert keep(place, inputs={"seed": 0}, identify=lambda: "files", work=dict).reused


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_damaged_identities_of_a_study_are_of_nothing(content, tmp_path):
    (tmp_path / IDENTITIES).write_bytes(content)
    found = study_identities(tmp_path)
    assert (found.base, found.data) == ("", {})


CELL = {"folder": "a", "key": "k", "status": "done", "attempts": []}
STATES = {
    **ODD,
    **{
        name: render_sealed({"format": STATE_FORMAT, "cells": cells}).encode()
        for name, cells in {
            "cells of another type": 5,
            "cells that are none": [5],
            "a cell without a folder": [{"key": "k"}],
            "a cell with more": [{**CELL, "x": 1}],
            "attempts of another type": [{**CELL, "attempts": 5}],
        }.items()
    },
}


@pytest.mark.parametrize("content", STATES.values(), ids=STATES)
def test_a_damaged_state_of_a_fleet_is_refused_by_name(content, tmp_path):
    (tmp_path / "fleet.json").write_bytes(content)
    with pytest.raises(FleetFileError, match=r"fleet\.json': is corrupt"):
        read_state(str(tmp_path))


def line(value):
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return blake3(text).hexdigest(8).encode() + b" " + text + b"\n"


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_a_journal_is_read_up_to_the_line_that_says_nothing(content, tmp_path):
    path = tmp_path / "journal"
    begun = {"format": FORMAT, "folder": 5, "plan": "p"}
    path.write_bytes(line(begun) + line(content) + line({"file": "x", "facts": {}}))
    journal = Journal(path)
    journal.close()
    assert (journal.inode, journal.plan) == (5, "p")
    path.write_bytes(line(content) + line(begun))
    journal = Journal(path)
    journal.close()
    assert (journal.inode, journal.plan, os.path.getsize(path)) in {(None, None, 0), (5, "p", os.path.getsize(path))}
