"""Merging several patches: the bytes of single merges from one reading of the model; who fails stops no other."""

import os
import shutil
import signal
from collections import Counter, namedtuple

import pytest
import torch

from portllm.checkpoint.open import open_checkpoint
from portllm.checkpoint.safetensors.writer import ShardWriter
from portllm.errors import (
    CheckpointError,
    NonFiniteError,
    OutputBusyError,
    OutputError,
    OutputExistsError,
    PlanRefusedError,
)
from portllm.files import output_folder
from portllm.merging import blocks
from portllm.merging import merge as merging
from portllm.merging import with_torch as changes
from portllm.merging.manifest import MergeReport
from portllm.merging.merge import merge, merge_each
from portllm.merging.options import MergeOptions
from portllm.merging.rounding_modes import Stochastic
from portllm.patch.adapter_folder import load_patch
from portllm.tensors.spans import SpanReader
from tests.processes import die, in_child
from tests.safetensors_files import contents

SHARD_BYTES = 1600

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:.*tie"),
]

KINDS = {
    "plain": {"seed": 1},
    "another": {"seed": 2, "r": 2, "target_modules": ["q_proj", "down_proj"]},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "up_proj"]},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["norm"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [3, 17]}},
    "head": {"target_modules": ["q_proj", "lm_head"]},  # gives a tied model a head of its own
}
GPT2_KINDS = {
    "plain": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "dora": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
}


@pytest.fixture(scope="module")
def patches(tiny):
    """Adapters of many kinds, by the name of each."""

    def make(kinds=KINDS, of=None):
        return {name: load_patch(tiny("adapter", of=of, **lora)) for name, lora in kinds.items()}

    return make


@pytest.fixture
def read(monkeypatch):
    """Bytes that are read of each tensor of a model, by file and name."""
    counts, fill = Counter(), SpanReader._fill

    def count(self, memory, info, start):
        counts[str(info.file), info.name] += len(memory)
        fill(self, memory, info, start)

    monkeypatch.setattr(SpanReader, "_fill", count)
    return counts


def under(folder, patches):
    return {folder / name: patch for name, patch in patches.items()}


def merge_one_by_one(folder, patches, into, **options):
    return {name: merge(patch, into=into, out=folder / name, **options) for name, patch in patches.items()}


def once(model):
    return {(str(info.file), info.name): info.n_bytes for info in model.infos.values()}


@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({}, True),
        pytest.param({}, False, marks=pytest.mark.slow),
        ({"dtype": "F32"}, True),
        ({"rounding": Stochastic(3)}, False),
    ],
    ids=str,
)
def test_each_output_is_that_of_a_merge_alone_and_the_model_is_read_once(
    options, tied, patches, tiny, tmp_path, read, monkeypatch
):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 12 * 16)
    base = tiny("base", tied=tied, dtype=torch.bfloat16)
    into, given = open_checkpoint(base), patches(of=base)
    options = MergeOptions(shard_bytes=SHARD_BYTES, **options)
    reports = merge_each(under(tmp_path / "each", given), into=into, options=options)
    assert read == once(into)
    alone = merge_one_by_one(tmp_path / "alone", given, into, options=options)
    assert contents(tmp_path / "each") == contents(tmp_path / "alone")
    assert {out.name: report for out, report in reports.items()} == alone


def test_a_norm_that_runs_over_all_rows_changes_no_byte_of_the_patches_beside_it(patches, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 12 * 16)
    from tests import models

    base = models.make_base(tmp_path / "base", kind="gpt2")
    into, given = open_checkpoint(base), patches(GPT2_KINDS, of=base)
    merge_each(under(tmp_path / "each", given), into=into)
    merge_one_by_one(tmp_path / "alone", given, into)
    for name in given:  # the measures are summed by blocks, and differ in their last digit
        each, alone = (tmp_path / folder / name / "model.safetensors" for folder in ("each", "alone"))
        assert each.read_bytes() == alone.read_bytes()


def test_what_no_patch_touches_is_rounded_once_for_all(patches, tiny, tmp_path, monkeypatch):
    rounded, cast = [], changes._cast
    monkeypatch.setattr(changes, "_cast", lambda step, *rest: rounded.append(step.entry.name) or cast(step, *rest))
    given = {name: patches()["another"] for name in "abc"}
    merge_each(under(tmp_path, given), into=open_checkpoint(tiny("base")), options=MergeOptions(dtype="F32"))
    assert rounded
    assert set(Counter(rounded).values()) == {1}


def test_more_than_can_be_written_at_once_are_written_by_turns(patches, tiny, tmp_path, read, monkeypatch):
    monkeypatch.setattr(merging, "MOST_AT_ONCE", 2)
    into, given = open_checkpoint(tiny("base")), {name: patches()["plain"] for name in "abcde"}
    reports = merge_each(under(tmp_path, given), into=into)
    assert read == {tensor: 3 * n_bytes for tensor, n_bytes in once(into).items()}
    assert [out.name for out in reports] == list("abcde")
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in given}) == 1


# ---- one that fails


def test_each_that_fails_has_its_error_and_the_others_are_written(patches, tiny, tmp_path):
    into = open_checkpoint(tiny("base"))
    good = patches()["plain"]
    bad = shutil.copytree(tiny("adapter", r=2), tmp_path / "bad")
    with open(bad / "adapter_model.safetensors", "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\xc0\x7f")  # NaN
    gone = load_patch(shutil.copytree(tiny("adapter"), tmp_path / "gone"))
    (tmp_path / "gone" / "adapter_model.safetensors").unlink()
    misfit = load_patch(tiny("adapter", of=tiny("base", inner=24)))
    given = {"a": good, "not finite": load_patch(bad), "gone": gone, "misfit": misfit, "there": good, "b": good}
    (tmp_path / "out" / "there").mkdir(parents=True)
    found = {out.name: result for out, result in merge_each(under(tmp_path / "out", given), into=into).items()}
    expected = {
        "a": MergeReport,
        "not finite": NonFiniteError,
        "gone": CheckpointError,
        "misfit": PlanRefusedError,
        "there": OutputExistsError,
        "b": MergeReport,
    }
    assert {name: type(result) for name, result in found.items()} == expected
    assert sorted(os.listdir(tmp_path / "out")) == ["a", "b", "there"]
    merge(good, into=into, out=tmp_path / "alone" / "a")
    merge(good, into=into, out=tmp_path / "alone" / "b")
    assert contents(tmp_path / "alone") == {
        name: data for name, data in contents(tmp_path / "out").items() if name[0] in "ab"
    }


@pytest.mark.parametrize("method", ["__init__", "_write", "close"])
def test_an_output_that_cannot_be_written_fails_alone(method, patches, tiny, tmp_path, monkeypatch):
    whole = getattr(ShardWriter, method)

    def fail(self, *rest, **options):
        folder = rest[0] if method == "__init__" else self._path.parent
        if folder.name == ".full.part":
            raise OSError(28, "No space left on device")
        return whole(self, *rest, **options)

    monkeypatch.setattr(ShardWriter, method, fail)
    given = {name: patches()["plain"] for name in ("full", "a")}
    found = merge_each(
        under(tmp_path, given), into=open_checkpoint(tiny("base")), options=MergeOptions(shard_bytes=SHARD_BYTES)
    )
    assert isinstance(found[tmp_path / "a"], MergeReport)
    assert isinstance(found[tmp_path / "full"], OutputError)
    assert "full': could not be written: No space left on device" in str(found[tmp_path / "full"])
    assert os.listdir(tmp_path) == ["a"]


def test_a_model_that_cannot_be_read_leaves_no_output(patches, tiny, tmp_path, monkeypatch):
    def fail(self, memory, info, start):
        raise CheckpointError("the disk fails")

    monkeypatch.setattr(SpanReader, "_fill", fail)
    given = {name: patches()["plain"] for name in "ab"}
    found = merge_each(under(tmp_path, given), into=open_checkpoint(tiny("base")))
    assert [str(error) for error in found.values()] == ["the disk fails"] * 2
    assert os.listdir(tmp_path) == []


def test_room_is_promised_once(patches, tiny, tmp_path, monkeypatch):
    into, given = open_checkpoint(tiny("base")), {name: patches()["plain"] for name in "abc"}
    n_bytes = sum(info.n_bytes for info in into.infos.values())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda folder: usage(0, 0, int(2.5 * n_bytes)))
    found = merge_each(under(tmp_path, given), into=into)
    assert isinstance(found[tmp_path / "c"], PlanRefusedError)
    assert "Free some space" in str(found[tmp_path / "c"])
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_an_output_inside_another_or_on_another_patch_is_refused(patches, tiny, tmp_path):
    into, patch = open_checkpoint(tiny("base")), patches()["plain"]
    other = load_patch(shutil.copytree(tiny("adapter"), tmp_path / "other"))
    before = contents(tmp_path)
    given = {tmp_path / "a": patch, tmp_path / "a" / "b": patch, tmp_path / "other": patch, tmp_path / "c": other}
    found = merge_each(given, into=into, overwrite=True)
    assert "would contain" in str(found[tmp_path / "a"])
    assert "which is an input" in str(found[tmp_path / "other"])
    assert {name: data for name, data in contents(tmp_path).items() if name.startswith("other/")} == before
    assert sorted(os.listdir(tmp_path)) == ["a", "c", "other"]


def test_an_output_that_another_run_writes_is_left_to_it(patches, tiny, tmp_path):
    into, given = open_checkpoint(tiny("base")), under(tmp_path, {name: patches()["plain"] for name in "ab"})
    found = []

    def interfere(label, done, total, unit):
        if not found:
            found.append(merge_each({**given, tmp_path / "c": patches()["plain"]}, into=into))

    reports = merge_each(given, into=into, progress=interfere)
    assert [type(result) for result in found[0].values()] == [OutputBusyError, OutputBusyError, MergeReport]
    assert [type(result) for result in reports.values()] == [MergeReport] * 2


# ---- death


@pytest.mark.parametrize("deaths", [3, pytest.param(14, marks=pytest.mark.slow)])
def test_after_a_death_at_any_byte_the_same_call_makes_the_same_bytes(deaths, patches, tiny, tmp_path, monkeypatch):
    into, given = open_checkpoint(tiny("base")), {name: patches()[name] for name in ("plain", "head")}
    started, start = [], ShardWriter.__init__

    def note(self, folder, shard, **options):
        started.append((folder.name, shard.file))
        start(self, folder, shard, **options)

    monkeypatch.setattr(ShardWriter, "__init__", note)
    merge_each(under(tmp_path / "whole", given), into=into, options=MergeOptions(shard_bytes=SHARD_BYTES))
    expected, all_files, n_kept = contents(tmp_path / "whole"), len(started), 0
    total = sum(len(data) for name, data in expected.items() if name.endswith(".safetensors"))
    for n_bytes in range(0, total, total // deaths):
        folder = tmp_path / str(n_bytes)
        for name in given:
            (folder / name).mkdir(parents=True)
            (folder / name / "patch.json").write_bytes(b"old")

        def run(n_bytes=n_bytes, folder=folder):
            write, seen = ShardWriter._write, 0

            def count(self, data, place):
                nonlocal seen
                seen += len(memoryview(data).cast("B"))
                if seen > n_bytes:
                    die()
                write(self, data, place)

            ShardWriter._write = count
            merge_each(under(folder, given), into=into, options=MergeOptions(shard_bytes=SHARD_BYTES), overwrite=True)

        assert in_child(run) == -signal.SIGKILL
        assert contents(folder / "head") == contents(folder / "plain") == {"patch.json": b"old"}
        started.clear()
        merge_each(under(folder, given), into=into, options=MergeOptions(shard_bytes=SHARD_BYTES), overwrite=True)
        assert contents(folder) == expected
        assert sorted(os.listdir(folder)) == sorted(given)
        n_kept += all_files - len(started)
    assert n_kept > 0
