"""Merging into a model's own files: the same bytes as anywhere else, back bit for bit, whatever dies in between."""

import json
import os
import shutil
import signal
from collections import namedtuple

import pytest
import torch

from portllm.checkpoint.open import open_checkpoint
from portllm.errors import (
    CheckpointError,
    NonFiniteError,
    OutputBusyError,
    OutputError,
    PlanRefusedError,
    UnsupportedDtypeError,
)
from portllm.merging import in_place
from portllm.merging import tensor as make_tensor
from portllm.merging import undo as keeping
from portllm.merging.in_place import merge_in_place, plan_in_place, undo_merge
from portllm.merging.merge import merge
from portllm.merging.options import MergeOptions
from portllm.merging.rounding_modes import Stochastic
from portllm.patch.adapter_folder import load_patch
from portllm.verifying.verify import verify
from tests.processes import die, die_at_event, in_child
from tests.safetensors_files import contents

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of a tiny model in several files, to be overwritten."""
    return shutil.copytree(tiny("base", max_shard_size="3KB"), tmp_path / "model")


@pytest.fixture
def patch(tiny):
    return load_patch(tiny("adapter"))


def weights(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors") and "/" not in name}


def tensors(folder):
    from portllm.tensors.bytes import read_bytes

    return {name: read_bytes(info) for name, info in open_checkpoint(folder).infos.items()}


def test_the_tensors_are_those_of_a_merge_into_another_folder(model, patch, tmp_path):
    elsewhere = merge(patch, into=open_checkpoint(model), out=tmp_path / "out")
    told = []
    report = merge_in_place(patch, model, progress=lambda *now: told.append(now))
    assert tensors(model) == tensors(tmp_path / "out")
    assert report.output.digest == elsewhere.output.digest
    assert report.into.digest == elsewhere.into.digest
    assert report.tensors == elsewhere.tensors
    assert told[-1][1] == told[-1][2]


def test_the_manifest_says_that_it_was_done_in_place_and_the_model_verifies(model, patch):
    merge_in_place(patch, model)
    assert json.loads((model / "portllm.json").read_text())["merged_in_place"] is True
    assert all(check.holds for check in verify(model).checks)


def test_a_header_that_is_changed_after_a_merge_in_place_is_found(model, patch):
    merge_in_place(patch, model)
    file = next(model.glob("*.safetensors"))
    file.write_bytes(file.read_bytes().replace(b'"pt"', b'"tf"', 1))
    assert [check.subject for check in verify(model).checks if not check.holds] == [file.name]


def test_undone_every_byte_of_the_folder_is_as_it_was(model, patch):
    before = contents(model)
    report = merge_in_place(patch, model)
    assert weights(model) != {name: before[name] for name in weights(model)}
    assert undo_merge(model) == len(report.tensors)
    assert contents(model) == before


def test_undone_a_manifest_of_an_earlier_merge_is_back(patch, tiny, tmp_path):
    merge(patch, into=open_checkpoint(tiny("base")), out=tmp_path / "model")
    before = contents(tmp_path / "model")
    merge_in_place(load_patch(tiny("adapter", seed=5)), tmp_path / "model")
    undo_merge(tmp_path / "model")
    assert contents(tmp_path / "model") == before


def test_stochastic_rounding_in_place_is_that_of_any_merge(model, patch, tmp_path):
    merge(patch, into=open_checkpoint(model), out=tmp_path / "out", options=MergeOptions(rounding=Stochastic(3)))
    merge_in_place(patch, model, rounding=Stochastic(3))
    assert tensors(model) == tensors(tmp_path / "out")


# ---- death


def die_at_write(number):
    """Die in the middle of the `number`-th write into the model's own files."""
    whole, seen = in_place._write, 0

    def write(file, place, start, data):
        nonlocal seen
        if seen == number:
            whole(file, place, start, data[: len(data) // 2])
            die()
        seen += 1
        whole(file, place, start, data)

    in_place._write = write
    make_tensor.default_threads = lambda: 1


@pytest.mark.parametrize("way_out", ["again", "undo", "undo dies too"])
@pytest.mark.parametrize("number", [0, 1, 6, 13])
def test_after_a_death_the_same_command_finishes_or_undo_restores(number, way_out, model, patch, tmp_path):
    before = contents(model)
    expected = shutil.copytree(model, tmp_path / "expected" / "model")
    merge_in_place(patch, expected)

    def run():
        die_at_write(number)
        merge_in_place(patch, model)

    def run_undo():
        die_at_write(number)
        undo_merge(model)

    assert in_child(run) == -signal.SIGKILL
    with pytest.raises(CheckpointError, match="an in-place merge is running there or was interrupted"):
        open_checkpoint(model)
    if way_out == "undo dies too":
        assert in_child(run_undo) == -signal.SIGKILL
        with pytest.raises(CheckpointError, match="interrupted"):
            open_checkpoint(model)
    if way_out == "again":
        merge_in_place(patch, model)
        assert weights(model) == weights(expected)
        undo_merge(model)
    else:
        undo_merge(model)
    assert contents(model) == before


@pytest.mark.parametrize("stride", [23, pytest.param(5, marks=pytest.mark.slow)])
def test_a_death_at_any_step_leaves_a_model_or_a_mark(stride, model, patch, tmp_path):
    """Each file that is opened, renamed or removed is a step."""
    before = contents(model)
    finished = shutil.copytree(model, tmp_path / "finished" / "model")
    merge_in_place(patch, finished)
    after = weights(finished)
    for number in range(0, 400, stride):
        folder = shutil.copytree(model, tmp_path / str(number) / "model")

        def run(number=number, folder=folder):
            make_tensor.default_threads = lambda: 1
            die_at_event(number, below=folder)
            merge_in_place(patch, folder)

        status = in_child(run)
        marked = (folder / "portllm-unfinished.json").exists()
        assert marked or weights(folder) in (weights(model), after)
        if status == 0:
            break
        if number % 2 and (folder / ".portllm-undo").exists():
            undo_merge(folder)
            assert contents(folder) == before
        elif weights(folder) != after or marked:
            merge_in_place(patch, folder)
            assert weights(folder) == after
    assert status == 0
    assert number > 30


def test_another_patch_does_not_finish_what_was_interrupted(model, patch, tiny):
    def run():
        die_at_write(3)
        merge_in_place(patch, model)

    assert in_child(run) == -signal.SIGKILL
    with pytest.raises(OutputError, match="a merge with another patch or other options was interrupted"):
        merge_in_place(load_patch(tiny("adapter", seed=9)), model)
    with pytest.raises(OutputError, match="other options"):
        merge_in_place(patch, model, rounding=Stochastic(1))
    merge_in_place(patch, model)


# ---- failures that are noticed


def test_a_merge_that_fails_restores_what_it_has_overwritten(model, patch, monkeypatch):
    before = contents(model)
    whole, seen = in_place.make_tensor, []

    def fail(targets, *rest):
        if targets[0].step.change is not None:
            seen.append(targets)
        if len(seen) == 5:
            return [NonFiniteError("here")]
        return whole(targets, *rest)

    monkeypatch.setattr(in_place, "make_tensor", fail)
    with pytest.raises(NonFiniteError, match="here"):
        merge_in_place(patch, model)
    assert contents(model) == before


def test_a_disk_that_fills_up_while_old_bytes_are_kept_leaves_the_model_alone(model, patch, monkeypatch):
    before = contents(model)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(in_place, "write_undo", full)
    with pytest.raises(OutputError, match="No space left"):
        merge_in_place(patch, model)
    assert contents(model) == before


def test_kept_bytes_that_are_damaged_are_not_written_back(model, patch):
    merge_in_place(patch, model)
    kept = model / ".portllm-undo" / "model.safetensors"
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    before = contents(model)
    with pytest.raises(CheckpointError, match="the saved bytes of '.*' are corrupt, so nothing was changed"):
        undo_merge(model)
    assert contents(model) == before


def test_a_note_of_what_was_kept_that_was_changed_is_refused(model, patch):
    merge_in_place(patch, model)
    note = model / ".portllm-undo" / "undo.json"
    note.write_text(note.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match=r"undo\.json': format: is 2; expected 1\. Download"):
        undo_merge(model)


def test_a_model_that_was_changed_after_the_merge_is_not_mixed_with_its_past(model, patch):
    merge_in_place(patch, model)
    file = sorted(model.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="would mix two models"):
        undo_merge(model)


def test_a_model_without_a_merge_in_place_has_nothing_to_take_back(model, tmp_path):
    with pytest.raises(OutputError, match="there is no in-place merge to undo"):
        undo_merge(model)
    with pytest.raises(OutputError, match="cannot be opened as a folder"):
        undo_merge(tmp_path / "nowhere")


# ---- what is refused before anything is written


def refused(patch, where):
    before = contents(where)
    with pytest.raises(PlanRefusedError) as error:
        merge_in_place(patch, where)
    assert contents(where) == before
    return str(error.value)


def test_a_second_merge_in_place_is_refused_until_the_first_is_undone_or_kept(model, patch):
    before = contents(model)
    merge_in_place(patch, model)
    assert "has an in-place merge that can still be undone" in refused(patch, model)
    undo_merge(model)
    merge_in_place(patch, model)
    shutil.rmtree(model / ".portllm-undo")
    merge_in_place(patch, model)
    assert weights(model) != {name: before[name] for name in weights(model)}


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_file_that_belongs_to_others_too_is_refused(kind, model, patch, tmp_path):
    file = sorted(model.glob("*.safetensors"))[0]
    if kind == "hard":
        os.link(file, tmp_path / "other.safetensors")
    else:
        file.rename(tmp_path / "other.safetensors")
        file.symlink_to(tmp_path / "other.safetensors")
    assert "is a link, so its contents are shared" in refused(patch, model)


def test_a_model_without_room_beside_it_is_refused_and_told_how_much_is_needed(model, patch, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(in_place.shutil, "disk_usage", lambda folder: usage(10**6, 10**6, 5))
    n_bytes = plan_in_place(patch, model).kept_bytes
    assert f"{n_bytes:,} bytes must be saved for --undo, but the disk has 5 free" in refused(patch, model)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:.*tie")
def test_a_head_that_would_be_untied_has_no_place_and_is_refused(tiny, tmp_path):
    base = tiny("base", dtype=torch.float32)
    adapter = tiny("adapter", of=base, target_modules=["q_proj", "lm_head"])
    model = shutil.copytree(base, tmp_path / "model")
    assert "a separate head or more rows, for which the model's files have no space" in refused(
        load_patch(adapter), model
    )


def test_what_is_no_folder_is_refused(tiny, patch):
    for where in (tiny("base") / "model.safetensors", tiny("base") / "nothing"):
        with pytest.raises(OutputError, match="only a local folder can be merged in place"):
            merge_in_place(patch, where)


def test_stochastic_rounding_of_other_dtypes_is_refused(tiny, tmp_path, patch):
    model = shutil.copytree(tiny("base", dtype=torch.float32), tmp_path / "model")
    before = contents(model)
    with pytest.raises(UnsupportedDtypeError, match="stochastic rounding only supports BF16"):
        merge_in_place(patch, model, rounding=Stochastic())
    assert contents(model) == before


def test_two_runs_on_one_folder_are_not_let_loose_on_each_other(model, patch):
    with keeping.alone(model), pytest.raises(OutputBusyError, match="another run is writing there"):
        merge_in_place(patch, model)
    stale = plan_in_place(patch, model)
    merge_in_place(patch, model)
    with pytest.raises(OutputBusyError, match="was changed by another run in the meantime"):
        in_place.run_in_place(stale)
