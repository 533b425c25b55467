"""Merging into trouble: death at any moment, a full disk, a folder that cannot be written, signals, a second run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import pytest

from portllm.checkpoint.open import open_checkpoint
from portllm.checkpoint.safetensors.writer import ShardWriter
from portllm.errors import OutputBusyError, OutputError, PlanRefusedError
from portllm.files import output_folder
from portllm.merging.merge import merge
from portllm.merging.options import MergeOptions
from portllm.patch.adapter_folder import load_patch
from portllm.progress import silent
from tests.processes import die, die_at_event, in_child, limited
from tests.safetensors_files import contents

SHARD_BYTES = 1600

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def case(tiny):
    """A patch, the model it belongs to, and a call that merges them into several shards."""

    def run(out, *, adapter=None, overwrite=True, progress=silent, **options):
        patch = load_patch(adapter or tiny("adapter"))
        return merge(
            patch,
            into=open_checkpoint(tiny("base")),
            out=out,
            options=MergeOptions(shard_bytes=SHARD_BYTES, **options),
            overwrite=overwrite,
            progress=progress,
        )

    return run


@pytest.fixture(scope="module")
def expected(case, tmp_path_factory):
    """The files of an undisturbed run."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setenv("PORTLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        case(out)
    return contents(out)


@pytest.fixture
def written(monkeypatch):
    """Names of the shards that this process writes."""
    names = []
    start = ShardWriter.__init__

    def note(self, folder, shard, **options):
        names.append(shard.file)
        start(self, folder, shard, **options)

    monkeypatch.setattr(ShardWriter, "__init__", note)
    return names


def old(out):
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"old")
    return {"model.safetensors": b"old"}


def shards_of(files):
    return sorted(name for name in files if name.endswith(".safetensors"))


def die_after(n_bytes):
    """Die in the middle of the write that would go beyond so many bytes, half of it done."""
    write, seen = ShardWriter._write, 0

    def count(self, data, place):
        nonlocal seen
        view = memoryview(data).cast("B")
        seen += len(view)
        if seen > n_bytes:
            write(self, view[: len(view) // 2], place)
            die()
        write(self, data, place)

    ShardWriter._write = count


def noted(out):
    """Files that a dead run has noted as finished."""
    lines = (out.parent / f".{out.name}.journal").read_text().splitlines()
    return [note["file"] for note in (json.loads(line.partition(" ")[2]) for line in lines) if "file" in note]


# ---- death


@pytest.mark.parametrize("deaths", [4, pytest.param(24, marks=pytest.mark.slow)])
def test_a_death_at_any_byte_leaves_the_old_model_and_the_next_run_makes_the_same_bytes(
    deaths, case, expected, tmp_path, written
):
    total = sum(len(expected[name]) for name in shards_of(expected))
    assert len(shards_of(expected)) >= 5
    kept = 0
    for n_bytes in [*range(0, total, total // deaths), total - 1]:
        folder = tmp_path / str(n_bytes)
        folder.mkdir()
        before = old(folder / "out")

        def run(n_bytes=n_bytes, folder=folder):
            die_after(n_bytes)
            case(folder / "out")

        assert in_child(run) == -signal.SIGKILL
        assert contents(folder / "out") == before
        finished = noted(folder / "out")
        written.clear()
        case(folder / "out")
        assert contents(folder) == {f"out/{name}": data for name, data in expected.items()}
        assert os.listdir(folder) == ["out"]
        assert sorted([*written, *finished]) == shards_of(expected)
        kept += len(finished)
    assert kept > 0


@pytest.mark.parametrize("stride", [23, pytest.param(3, marks=pytest.mark.slow)])
def test_a_death_at_any_step_leaves_the_old_model_or_the_new(stride, case, expected, tmp_path):
    """Each file that is opened, renamed or removed is a step."""
    for number in range(0, 400, stride):
        folder = tmp_path / str(number)
        folder.mkdir()
        before = old(folder / "out")

        def run(number=number, folder=folder):
            die_at_event(number, below=folder)
            case(folder / "out")

        status = in_child(run)
        assert contents(folder / "out") in (before, expected)
        if status == 0:
            break
        case(folder / "out")
        assert contents(folder) == {f"out/{name}": data for name, data in expected.items()}
        assert os.listdir(folder) == ["out"]
    assert status == 0
    assert number > 30


def test_the_report_of_a_resumed_run_is_that_of_an_undisturbed_one(case, expected, tmp_path):
    undisturbed = case(tmp_path / "a" / "out")

    def run():
        die_after(6000)
        case(tmp_path / "b" / "out")

    assert in_child(run) == -signal.SIGKILL
    assert case(tmp_path / "b" / "out") == undisturbed


@pytest.mark.parametrize("change", ["patch", "dtype", "layout", "rounding", "model"])
def test_shards_of_another_plan_are_not_taken_over(change, case, tiny, expected, tmp_path, written):
    from portllm.merging.rounding_modes import Stochastic

    def run():
        die_after(8000)
        case(tmp_path / "out")

    assert in_child(run) == -signal.SIGKILL
    written.clear()
    base = tmp_path / "base"
    shutil.copytree(tiny("base"), base)
    os.utime(base / "model.safetensors", ns=(1, 1))
    options = {
        "patch": lambda out: case(out, adapter=tiny("adapter", seed=9)),
        "dtype": lambda out: case(out, dtype="F32"),
        "layout": lambda out: merge(
            load_patch(tiny("adapter")),
            into=open_checkpoint(tiny("base")),
            out=out,
            options=MergeOptions(shard_bytes=SHARD_BYTES + 300),
        ),
        "rounding": lambda out: case(out, rounding=Stochastic(3)),
        "model": lambda out: merge(
            load_patch(tiny("adapter")),
            into=open_checkpoint(base),
            out=out,
            options=MergeOptions(shard_bytes=SHARD_BYTES),
        ),
    }[change]
    options(tmp_path / "out")
    assert written == shards_of(contents(tmp_path / "out"))
    options(tmp_path / "undisturbed" / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed" / "out")


def test_a_finished_shard_that_was_damaged_meanwhile_is_written_again(case, expected, tmp_path, written):
    def die_at_the_end():
        import portllm.merging.merge as merging

        merging.write_index = lambda *_: die()
        case(tmp_path / "out")

    assert in_child(die_at_the_end) == -signal.SIGKILL
    shard = tmp_path / ".out.part" / shards_of(expected)[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    written.clear()
    case(tmp_path / "out")
    assert written == [shard.name]
    assert contents(tmp_path / "out") == expected


# ---- signals, as a user or a scheduler sends them

PROGRAM = """
import dataclasses, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background inherits that it is ignored
import portllm.merging.plan as plan
from portllm.files.staging import Staged

shard_bytes, plan_merge = int(sys.argv.pop(1)), plan.plan_merge
plan.plan_merge = lambda *patch, options, **more: plan_merge(
    *patch, options=dataclasses.replace(options, shard_bytes=shard_bytes), **more
)
ready, shards, finish = sys.argv.pop(1), [], Staged.finish

def wait_in_the_third(self, *noted):
    shards.append(self)
    if len(shards) == 3:
        open(ready, "w").close()
        time.sleep(60)
    finish(self, *noted)

Staged.finish = wait_in_the_third
from portllm.cli.main import main
main()
"""


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_program_and_the_next_run_goes_on(sent, status, case, tiny, expected, tmp_path, written):
    folder, ready = tmp_path / "work", tmp_path / "ready"
    folder.mkdir()
    before = old(folder / "out")
    arguments = ["merge", tiny("adapter"), "--into", tiny("base"), "-o", folder / "out", "--overwrite", "--quiet"]
    program = [sys.executable, "-c", PROGRAM, str(SHARD_BYTES), ready, *arguments]
    with subprocess.Popen([str(word) for word in program], stderr=subprocess.PIPE, text=True) as run:
        while not ready.exists() and run.poll() is None:
            time.sleep(0.01)  # until the program is where it is to be stopped
        run.send_signal(sent)
        told = run.communicate(timeout=60)[1]
    assert run.returncode == status, told
    assert "Traceback" not in told
    assert "no partial output was left, and the same command resumes" in told
    assert contents(folder / "out") == before
    written.clear()
    case(folder / "out")
    assert len(written) == len(shards_of(expected)) - 2
    assert contents(folder) == {f"out/{name}": data for name, data in expected.items()}
    assert os.listdir(folder) == ["out"]


# ---- no room, no right, no place


@pytest.mark.parametrize("n_bytes", [100, 1000, 3000])
def test_a_disk_that_fills_up_leaves_the_old_model_and_nothing_else(n_bytes, case, expected, tmp_path, monkeypatch):
    before = old(tmp_path / "out")
    monkeypatch.setenv("PORTLLM_CACHE", str(tmp_path / "no cache"))
    assert max(map(len, expected.values())) > n_bytes
    assert limited(n_bytes, lambda: case(tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == before
    assert os.listdir(tmp_path) == ["out"]
    case(tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_an_output_for_which_there_is_no_room_is_refused_before_anything_is_written(case, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda folder: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(PlanRefusedError, match=r"needs [\d,]+ bytes, but '.*' has 1,000 free\. Free some space"):
        case(tmp_path / "not there yet" / "out")
    assert os.listdir(tmp_path) == []


def test_what_an_interrupted_run_has_written_needs_no_room_again(case, expected, tmp_path, monkeypatch):
    def run():
        die_after(8000)
        case(tmp_path / "out")

    assert in_child(run) == -signal.SIGKILL
    usage = namedtuple("usage", "total used free")
    total = sum(len(expected[name]) for name in shards_of(expected))
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda folder: usage(total, 3000, total - 3000))
    case(tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_a_folder_that_cannot_be_written_is_told_and_stays_as_it_is():
    with tempfile.TemporaryDirectory() as open_to_all:
        shut = Path(open_to_all) / "shut"
        shut.mkdir()
        shut.chmod(0o555)
        Path(open_to_all).chmod(0o755)

        def run():
            if os.geteuid() == 0:
                os.seteuid(65534)  # root may write anywhere
            told = pytest.raises(OutputError, match="cannot write into '.*shut': Permission denied")
            with told, output_folder.staged_folder(shut / "out", overwrite=False):
                pass

        assert in_child(run) == 0
        assert os.listdir(shut) == []


@pytest.mark.parametrize("place", ["base", "adapter", ".out.part"])
def test_an_output_on_top_of_what_is_read_is_refused(place, tiny, tmp_path):
    base = shutil.copytree(tiny("base"), tmp_path / "base")
    adapter = shutil.copytree(tiny("adapter"), tmp_path / "adapter")
    out = {"base": base, "adapter": adapter, ".out.part": tmp_path / "out"}[place]
    if place == ".out.part":
        base = base.rename(tmp_path / ".out.part")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="which is an input"):
        merge(load_patch(adapter), into=open_checkpoint(base), out=out, overwrite=True)
    assert contents(tmp_path) == before


def test_a_second_merge_to_the_same_output_is_refused_while_the_first_goes_on(case, expected, tmp_path):
    refused = []

    def interfere(label, done, total, unit):
        if not refused:
            with pytest.raises(OutputBusyError) as caught:
                case(tmp_path / "out")
            refused.append(caught)

    case(tmp_path / "out", progress=interfere)
    assert refused
    assert contents(tmp_path / "out") == expected
    assert os.listdir(tmp_path) == ["out"]
