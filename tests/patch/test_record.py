"""The record as JSON values, and what is no record."""

import json
import re

import pytest
from msgspec.structs import replace

from portllm.checking.verdict import Answer
from portllm.files.record import encode
from portllm.files.typed import decode
from portllm.patch.record import Capture, Choice, ModelIdentity, PatchRecord, PortStep

COMMIT = "0123456789" * 4
ONE, TWO = "s4k1:" + "1" * 40, "s4k1:" + "2" * 40
DIGEST = "blake3:" + "1" * 64
BASE = ModelIdentity("base", ONE, DIGEST)
EVOLVED = ModelIdentity("evolved", TWO, None, revision=COMMIT)
FILES = {"adapter_config.json": "3" * 64, "adapter_model.safetensors": "4" * 64}
RECORD = PatchRecord(
    program="0.1.0",
    base=EVOLVED,
    capture=Capture("train", {"steps": 3}),
    ports=(PortStep(BASE, EVOLVED, "add", {"sampled_drift": 0.5}),),
    tensors={"a": "1" * 64, "b": "2" * 64},
    files=FILES,
)


def read(value):
    return decode(PatchRecord, value)


def test_by_hand_a_record_in_json():
    base = {"name": "base", "fingerprint": ONE, "digest": DIGEST, "revision": None}
    evolved = {"name": "evolved", "fingerprint": TWO, "digest": None, "revision": COMMIT}
    value = encode(RECORD)
    assert value == {
        "format": 1,
        "program": "0.1.0",
        "base": evolved,
        "capture": {"method": "train", "settings": {"steps": 3}},
        "ports": [{"from": base, "to": evolved, "method": "add", "evidence": {"sampled_drift": 0.5}}],
        "tensors": {"a": "1" * 64, "b": "2" * 64},
        "files": FILES,
    }
    assert list(value) == ["format", "program", "base", "capture", "ports", "tensors", "files"]
    assert read(value) == RECORD


def test_a_method_that_was_chosen_keeps_its_reason_in_json():
    choice = Choice("uncertain", "addition may hold", ("a cosine", "a drift"), is_forced=False)
    record = replace(RECORD, ports=(replace(RECORD.ports[0], choice=choice),))
    value = encode(record)
    assert value["ports"][0]["choice"] == {
        "verdict": "uncertain",
        "reason": "addition may hold",
        "findings": ["a cosine", "a drift"],
        "forced": False,
    }
    assert read(value) == record


@pytest.mark.parametrize("answer", [answer for answer in Answer if answer is not Answer.CANNOT_BE_PORTED])
def test_every_verdict_that_leaves_a_port_possible_can_be_read_again(answer):
    choice = Choice(str(answer), "so it was found", (), is_forced=False)
    record = replace(RECORD, ports=(replace(RECORD.ports[0], choice=choice),))
    assert read(encode(record)) == record


def test_a_record_from_before_revisions_were_kept_is_one_without():
    value = encode(RECORD)
    del value["base"]["revision"]
    assert read(value).base == ModelIdentity("evolved", TWO, None)


@pytest.mark.parametrize("field", ["format", "base", "capture", "ports", "tensors", "files", "program"])
def test_values_without_a_field_are_no_record(field):
    value = encode(RECORD)
    del value[field]
    with pytest.raises(ValueError, match=f"^{field}: is required$"):
        read(value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda value: value.update(format=2), "format: is 2; expected 1"),
        (lambda value: value.update(base=None), "base: is null; expected a table"),
        (lambda value: value["base"].update(name=3), "base.name: is 3; expected a text"),
        (lambda value: value["base"].update(nam="x"), "base.nam: unknown key. Did you mean name?"),
        (
            lambda value: value["ports"][0]["to"].update(fingerprint="s4k1:1"),
            "ports.0.to.fingerprint: is 's4k1:1'; expected s4k1: and 40 hexadecimal digits",
        ),
        (lambda value: value["ports"][0].update(method=""), "ports.0.method: is ''; expected a text that is not empty"),
        (
            lambda value: value["tensors"].update(b="2" * 64 + "\n"),
            f"tensors.b: is '{'2' * 64}\\n'; expected 64 hexadecimal digits, a blake3 digest",
        ),
        (
            lambda value: value["capture"].update(method="guess"),
            "capture.method: is 'guess'; expected 'adapter' or 'train' or 'tuned' or 'combine'",
        ),
        (
            lambda value: value["files"].pop("adapter_config.json"),
            "files: is a table; expected the digests of adapter_config.json and adapter_model.safetensors",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_its_place_and_what_was_expected(change, told):
    value = json.loads(json.dumps(encode(RECORD)))
    change(value)
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        read(value)
