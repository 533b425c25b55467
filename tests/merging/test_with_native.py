"""Merging in one pass gives the bytes that torch gives, and takes what it is written for."""

from dataclasses import replace

import pytest
import torch

import portllm
from portllm.checkpoint.open import open_checkpoint
from portllm.merging import tensor as make_tensor
from portllm.merging import with_native as fused
from portllm.merging.plan import plan_merge
from portllm.merging.rounding_modes import NEAREST, Stochastic
from portllm.merging.with_native import can_fuse
from tests.models import SEVERAL_SHARDS

pytestmark = pytest.mark.skipif(fused.kernels is None, reason="the loops were not built here")

WIDE = {"hidden": 24, "inner": 536}
"""Wide enough for products that every kernel makes alike, and for rows of more than one chunk."""

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def merge_both_ways(patch, into, tmp_path, monkeypatch):
    """The folders and reports of a merge in one pass and of one by torch."""
    one_pass = portllm.merge(patch, into=into, out=tmp_path / "fused")
    monkeypatch.setattr(make_tensor, "can_fuse", lambda *_: False)
    by_torch = portllm.merge(patch, into=into, out=tmp_path / "torch")
    return one_pass, by_torch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", ["1GB", SEVERAL_SHARDS])
def test_one_pass_and_torch_write_the_same_bytes(dtype, stored, tiny, tmp_path, monkeypatch):
    base = tiny("base", dtype=DTYPES[dtype], max_shard_size=stored, **WIDE)
    into = open_checkpoint(base)
    patch = portllm.load_patch(tiny("adapter", of=base, r=5, lora_alpha=7))
    fused_steps = [step for step in plan_merge(patch, into=into).steps.values() if can_fuse(step, NEAREST, "cpu")]
    assert fused_steps
    ours, torchs = merge_both_ways(patch, into, tmp_path, monkeypatch)
    assert ours.output.digest == torchs.output.digest
    for name, sums in torchs.tensors.items():
        assert ours.tensors[name].kept_gain == pytest.approx(sums.kept_gain, rel=1e-5)
        assert ours.tensors[name].rounding_loss == pytest.approx(sums.rounding_loss, rel=1e-5, abs=1e-7)


def test_what_it_is_not_written_for_is_left_to_torch(tiny):
    base = tiny("base", **WIDE)
    plan = plan_merge(portllm.load_patch(tiny("adapter", of=base)), into=open_checkpoint(base))
    step = next(step for step in plan.steps.values() if can_fuse(step, NEAREST, "cpu"))
    delta = step.change
    other = {
        "stochastic rounding": (step, Stochastic(0), "cpu"),
        "a GPU": (step, NEAREST, "cuda"),
        "another dtype": (replace(step, entry=replace(step.entry, dtype="F32")), NEAREST, "cpu"),
        "DoRA": (replace(step, change=replace(delta, magnitude=delta.a)), NEAREST, "cpu"),
        "a transposed weight": (replace(step, change=replace(delta, transposed=True)), NEAREST, "cpu"),
        "factors in float64": (replace(step, change=replace(delta, a=replace(delta.a, dtype="F64"))), NEAREST, "cpu"),
        "no change": (replace(step, change=None), NEAREST, "cpu"),
    }
    assert [name for name, given in other.items() if can_fuse(*given)] == []


def test_without_the_loops_nothing_is_left_to_them(tiny, monkeypatch):
    base = tiny("base", **WIDE)
    plan = plan_merge(portllm.load_patch(tiny("adapter", of=base)), into=open_checkpoint(base))
    monkeypatch.setattr(fused, "kernels", None)
    assert not any(can_fuse(step, NEAREST, "cpu") for step in plan.steps.values())
