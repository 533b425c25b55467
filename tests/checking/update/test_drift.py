"""Drift of two models on disk, against float64, whatever the size of a block and the number of threads."""

import math

import numpy as np
import pytest
from safetensors.torch import load_file

from portllm.checking.update import drift
from portllm.checking.update.drift import measure_drift, measure_pairs
from portllm.checkpoint.open import open_checkpoint
from portllm.matching.tensor_pairs import pair_tensors
from tests.safetensors_files import write_tensors

FLOAT32_SUMS = 1e-5
"""What the sums of float32 products over blocks may differ from float64 by, relatively."""


def test_drift_is_that_of_float64_whatever_the_block(tiny, monkeypatch):
    base, evolved = (open_checkpoint(tiny(kind)) for kind in ("base", "evolved"))
    report = measure_drift(base, evolved)
    w0, w1 = (load_file(tiny(kind) / "model.safetensors") for kind in ("base", "evolved"))
    assert set(report.tensors) == set(w0)
    assert report.left_out == ()
    for name, sums in report.tensors.items():
        move = w1[name].double() - w0[name].double()
        assert sums.relative == pytest.approx((move.norm() / w0[name].double().norm()).item(), rel=FLOAT32_SUMS)
    total = math.sqrt(sum((w1[n].double() - w0[n].double()).square().sum().item() for n in w0))
    norm = math.sqrt(sum(w0[n].double().square().sum().item() for n in w0))
    assert report.total.relative == pytest.approx(total / norm, rel=FLOAT32_SUMS)
    monkeypatch.setattr(drift, "BLOCK_ELEMENTS", 7)
    blocks = measure_drift(base, evolved)
    assert blocks.total.relative == pytest.approx(report.total.relative, rel=FLOAT32_SUMS)
    assert 0.05 < report.total.relative < 0.2


def test_a_model_has_no_drift_from_itself(tiny):
    base = open_checkpoint(tiny("base"))
    assert measure_drift(base, base).total.relative == 0.0


def test_what_cannot_be_compared_is_named(tmp_path):
    one = {"same": ("F32", (2,), bytes(8)), "shape": ("F32", (2,), bytes(8)), "old": ("F32", (1,), bytes(4))}
    other = {"same": ("BF16", (2,), bytes(4)), "shape": ("F32", (1, 2), bytes(8)), "new": ("F32", (1,), bytes(4))}
    one["whole"] = other["whole"] = ("I64", (1,), bytes(8))
    base, evolved = (
        open_checkpoint(write_tensors(tmp_path / f"{name}.safetensors", tensors))
        for name, tensors in (("base", one), ("evolved", other))
    )
    told = []
    report = measure_drift(base, evolved, progress=lambda *now: told.append(now))
    assert set(report.tensors) == {"same"}
    assert report.left_out == ("new", "old", "shape", "whole")
    assert told == [("drift", 12, 12, "bytes")]


def test_the_sums_are_the_same_bits_for_any_number_of_threads(tiny, monkeypatch):
    base, evolved = (open_checkpoint(tiny(kind)) for kind in ("base", "evolved"))
    monkeypatch.setattr(drift, "BLOCK_ELEMENTS", 50)
    one, three = (measure_drift(base, evolved, threads=threads) for threads in (1, 3))
    assert one == three


def test_columns_are_those_of_the_drift(tiny, monkeypatch):
    monkeypatch.setattr(drift, "BLOCK_ELEMENTS", 40)
    name = "model.layers.0.mlp.down_proj.weight"
    pairs = pair_tensors(*(open_checkpoint(tiny(kind)) for kind in ("base", "evolved"))).pairs
    found = measure_pairs([pairs[name]], columns={name: [0, 7, 19]})[name].columns
    w0, w1 = (load_file(tiny(kind) / "model.safetensors")[name].float() for kind in ("base", "evolved"))
    assert np.array_equal(found, (w1 - w0)[:, [0, 7, 19]].numpy())
