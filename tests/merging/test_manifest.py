"""The manifest: what it says, exactly, and that infinity does not break its JSON."""

import json
import math

from portllm.files.record import encode
from portllm.merging.manifest import MergeReport, is_manifest, render_manifest, report_to_json
from portllm.patch.record import Capture, ModelIdentity, PatchRecord
from portllm.patch.rounding import MergeSums

INTO, OUT = (
    ModelIdentity("evolved", "s4k1:" + "1" * 40, "blake3:" + "1" * 64),
    ModelIdentity("out", "s4k1:" + "2" * 40, "blake3:" + "2" * 64),
)
RECORD = PatchRecord("0.1.0", INTO, Capture("adapter", {}), ports=(), tensors={}, files={})


def report(**changes):
    values = {
        "output": OUT,
        "into": INTO,
        "patch": RECORD,
        "dtype": ("BF16",),
        "rounding": "nearest",
        "device": "cpu",
        "tensors": {
            "b": MergeSums(delta_sq=4.0, gain=3.0, lost_sq=1.0, weight_sq=100.0),
            "a": MergeSums(delta_sq=4.0, gain=4.0, lost_sq=0.0, weight_sq=0.0),
        },
        "n_copied": 3,
        "n_bytes": 10,
    }
    return MergeReport(**{**values, **changes})


def test_by_hand_the_content_of_a_manifest():
    value = report_to_json(report(), program="0.1.0")
    assert value["program"] == "0.1.0"
    assert value["into"]["fingerprint"] == INTO.fingerprint
    assert value["output"]["digest"] == OUT.digest
    assert value["patch"] == encode(RECORD)
    assert (value["dtype"], value["rounding"]) == (["BF16"], "nearest")
    assert (value["tensors_changed"], value["tensors_copied"], value["bytes"]) == (2, 3, 10)
    assert value["worst"] == "b"
    assert value["total"] == {"kept_gain": 0.875, "rounding_loss": 0.353553, "relative_size": 0.282843}
    assert list(value["tensors"]) == ["a", "b"]
    assert value["tensors"]["b"] == {"kept_gain": 0.75, "rounding_loss": 0.5, "relative_size": 0.2}


def test_a_weight_of_zero_has_no_relative_size_and_the_file_stays_json():
    def refuse(token):
        raise AssertionError(token)

    value = json.loads(render_manifest(report(), program="0.1.0"), parse_constant=refuse)
    assert value["tensors"]["a"]["relative_size"] is None
    assert value == report_to_json(report(), program="0.1.0")


def test_a_text_is_a_manifest_if_this_program_would_write_it():
    text = render_manifest(report(), program="0.1.0")
    assert is_manifest(text)
    for other in ("", "alias ls=rm", "[]", "{}", text.replace("0.1.0", "0.1.1"), text[:-3], "[" * 10000):
        assert not is_manifest(other)


def test_an_adapter_without_a_record_has_none_in_the_manifest():
    assert report_to_json(report(patch=None), program="0.1.0")["patch"] is None


def test_six_digits_hide_what_the_order_of_adding_changes():
    noisy = {name: MergeSums(4.0 * (1 + 1e-12), 3.0, 1.0, 100.0) for name in "ab"}
    plain = {name: MergeSums(4.0, 3.0, 1.0, 100.0) for name in "ab"}
    first, second = (report_to_json(report(tensors=tensors), program="0") for tensors in (noisy, plain))
    assert first == second


def test_a_report_without_changed_tensors_has_no_worst():
    empty = report(tensors={})
    assert (empty.worst, empty.total) == (None, MergeSums())
    assert report(tensors={"x": MergeSums(delta_sq=1.0, gain=math.nextafter(1.0, 0.0))}).worst == "x"
