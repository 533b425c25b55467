"""The record as JSON values, and what is no record."""

from dataclasses import replace

import pytest

from portllm.patch.record import (
    Capture,
    Choice,
    ModelIdentity,
    PatchRecord,
    PortStep,
    record_from_json,
    record_to_json,
)

COMMIT = "0123456789" * 4
BASE = ModelIdentity("base", "s4k1:1", "blake3:1")
EVOLVED = ModelIdentity("evolved", "s4k1:2", revision=COMMIT)
RECORD = PatchRecord(
    base=EVOLVED,
    capture=Capture("train", {"steps": 3}),
    ports=(PortStep(BASE, EVOLVED, "add", {"sampled_drift": 0.5}),),
    tensors={"b": "2", "a": "1"},
    program="0.1.0",
    files={"g": "4", "f": "3"},
)


def test_by_hand_a_record_in_json():
    base = {"name": "base", "fingerprint": "s4k1:1", "digest": "blake3:1", "revision": None}
    evolved = {"name": "evolved", "fingerprint": "s4k1:2", "digest": None, "revision": COMMIT}
    value = record_to_json(RECORD)
    assert value == {
        "format": 1,
        "program": "0.1.0",
        "base": evolved,
        "capture": {"method": "train", "settings": {"steps": 3}},
        "ports": [{"from": base, "to": evolved, "method": "add", "evidence": {"sampled_drift": 0.5}}],
        "tensors": {"a": "1", "b": "2"},
        "files": {"f": "3", "g": "4"},
    }
    assert (list(value["tensors"]), list(value["files"])) == (["a", "b"], ["f", "g"])
    assert record_from_json(value) == RECORD


def test_a_method_that_was_chosen_keeps_its_reason_in_json():
    choice = Choice("uncertain", "addition may hold", ("a cosine", "a drift"))
    record = replace(RECORD, ports=(replace(RECORD.ports[0], choice=choice),))
    value = record_to_json(record)
    assert value["ports"][0]["choice"] == {
        "verdict": "uncertain",
        "reason": "addition may hold",
        "findings": ["a cosine", "a drift"],
        "forced": False,
    }
    assert record_from_json(value) == record


def test_a_record_from_before_revisions_were_kept_is_one_without():
    value = record_to_json(RECORD)
    del value["base"]["revision"]
    assert record_from_json(value).base == ModelIdentity("evolved", "s4k1:2")


@pytest.mark.parametrize("field", ["base", "capture", "ports", "tensors", "files", "program"])
def test_values_without_a_field_are_no_record(field):
    value = record_to_json(RECORD)
    del value[field]
    with pytest.raises(ValueError, match=r"do not match the schema of patch\.json"):
        record_from_json(value)


@pytest.mark.parametrize("identity", [None, {}, {"name": "x", "fingerprint": 1, "digest": None}])
def test_values_without_an_identity_are_no_record(identity):
    with pytest.raises(ValueError, match="do not match the schema of a model's identity"):
        record_from_json({**record_to_json(RECORD), "base": identity})
