"""A staged folder: a death at any moment, two runs at once, and everything that a dead run can leave behind."""

import os
import signal

import pytest

from portllm.errors import OutputBusyError, OutputError, OutputExistsError
from portllm.files import own_files, staging
from portllm.files.output_folder import resumable_folder, staged_folder
from portllm.files.staging import Journal, Place, exchange
from tests.processes import die, die_at_event, in_child
from tests.safetensors_files import contents

OLD = {"a": b"old a", "patch.json": b"old"}
NEW = {"a": b"new a", "b.safetensors": b"new b", "c": b"new c"}
PLAN = "a plan"

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(params=["exchange", "two renames"])
def swap(request, monkeypatch):
    """On a file system that exchanges two folders in one step, and on one that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    return request.param


def make_old(out):
    out.mkdir()
    for name, data in OLD.items():
        (out / name).write_bytes(data)


def write(out, *, plan=PLAN, overwrite=True, new=NEW, before=lambda name: None):
    """Write `new` file by file as a run that can be resumed does; the files that had to be written."""
    written = []
    with resumable_folder(out, overwrite=overwrite, plan=plan) as staged:
        whole = [
            name
            for name, facts in staged.finished.items()
            if name in new and (staged.folder / name).exists() and (staged.folder / name).read_bytes() == new[name]
            and facts == {"length": len(new[name])}
        ]  # fmt: skip
        staged.keep(whole)
        for name, data in new.items():
            before(name)
            if name not in whole:
                (staged.folder / name).write_bytes(data)
                staged.finish(name, {"length": len(data)})
                written.append(name)
        before("end")
    return written


def state(out):
    return contents(out) if out.exists() else None


def names(folder):
    return sorted(os.listdir(folder))


# ---- death


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_death_at_any_moment_leaves_the_old_or_the_new_and_the_next_run_leaves_nothing_else(
    overwrite, swap, tmp_path
):
    before = OLD if overwrite else None
    for number in range(1000):
        folder = tmp_path / str(number)
        folder.mkdir()
        out = folder / "out"
        if overwrite:
            make_old(out)

        def run(out=out, folder=folder, number=number):
            die_at_event(number, below=folder)
            write(out, overwrite=overwrite)

        status = in_child(run)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        left = state(out)
        assert left in (before, NEW) or (swap == "two renames" and contents(folder / ".out.old") == OLD)
        if left == NEW and not overwrite:
            with pytest.raises(OutputExistsError):
                write(out, overwrite=False)
            write(out)
        else:
            write(out, overwrite=overwrite)
        assert state(out) == NEW
        assert names(folder) == ["out"]
    assert number > 15
    assert names(folder) == ["out"]


def test_a_run_goes_on_with_the_files_that_a_dead_one_finished(tmp_path):
    def run():
        write(tmp_path / "out", before=lambda name: die() if name == "c" else None)

    assert in_child(run) == -signal.SIGKILL
    assert names(tmp_path) == [".out.journal", ".out.part"]
    (tmp_path / ".out.part" / "half").write_bytes(b"what was being written")
    (tmp_path / ".out.part" / "folder").mkdir()
    assert write(tmp_path / "out") == ["c"]
    assert names(tmp_path / "out") == sorted(NEW)
    assert contents(tmp_path) == {f"out/{name}": data for name, data in NEW.items()}


@pytest.mark.parametrize("change", ["truncate", "other bytes", "delete"])
def test_a_finished_file_that_changed_meanwhile_is_written_again(change, tmp_path):
    in_child(lambda: write(tmp_path / "out", before=lambda name: die() if name == "c" else None))
    file = tmp_path / ".out.part" / "a"
    changes = {
        "truncate": lambda: os.truncate(file, 2),
        "other bytes": lambda: file.write_bytes(b"new A"),
        "delete": file.unlink,
    }
    changes[change]()
    assert write(tmp_path / "out") == ["a", "c"]
    assert state(tmp_path / "out") == NEW


@pytest.mark.parametrize("other", ["another plan", None])
def test_what_another_plan_left_is_not_used(other, tmp_path):
    in_child(lambda: write(tmp_path / "out", before=lambda name: die() if name == "c" else None))
    assert write(tmp_path / "out", plan=other) == sorted(NEW)
    assert names(tmp_path) == ["out"]


def test_a_run_that_died_where_one_of_another_plan_had_died_is_gone_on_with(tmp_path):
    for plan in ("another plan", PLAN):
        in_child(
            lambda plan=plan: write(tmp_path / "out", plan=plan, before=lambda name: die() if name == "c" else None)
        )
    assert write(tmp_path / "out") == ["c"]
    assert names(tmp_path) == ["out"]


def test_what_a_dead_run_without_a_plan_left_is_not_used(tmp_path):
    in_child(lambda: write(tmp_path / "out", plan=None, before=lambda name: die() if name == "c" else None))
    assert names(tmp_path) == [".out.journal", ".out.part"]
    assert write(tmp_path / "out") == sorted(NEW)


def test_a_line_that_was_cut_off_or_damaged_is_not_believed(tmp_path):
    in_child(lambda: write(tmp_path / "out", before=lambda name: die() if name == "end" else None))
    journal = tmp_path / ".out.journal"
    whole = journal.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 4
    damaged = lines[2].replace(b"5", b"6")
    for text, kept in (
        (whole, sorted(NEW)),
        (whole[:-1], ["a", "b.safetensors"]),
        (whole[:-30], ["a", "b.safetensors"]),
        (lines[0] + lines[1] + damaged + lines[3], ["a"]),
        (b"", []),
        (b"\x00" * 100, []),
        (whole[:10], []),
    ):
        journal.write_bytes(text)
        read = Journal(journal)
        assert sorted(read.finished) == kept
        read.close()
    with pytest.raises(OutputError, match="it was not created by a run of this program"):
        write(tmp_path / "out")


# ---- what a dead run between two renames leaves


def test_an_old_output_that_lost_its_name_gets_it_back(tmp_path):
    make_old(tmp_path / ".out.old")
    with pytest.raises(OutputExistsError):
        write(tmp_path / "out", overwrite=False)
    assert contents(tmp_path) == {f"out/{name}": data for name, data in OLD.items()}


@pytest.mark.parametrize("is_known", [True, False])
def test_an_old_output_beside_the_new_one_is_removed_if_the_new_one_is_known(is_known, tmp_path):
    make_old(tmp_path / ".out.old")
    make_old(tmp_path / "out")
    if is_known:
        journal = Journal(tmp_path / ".out.journal")
        journal.begin(tmp_path / "out", None)
        journal.close()
        write(tmp_path / "out")
        assert names(tmp_path) == ["out"]
    else:
        with pytest.raises(OutputError, match="Delete the one that you do not want"):
            write(tmp_path / "out")
        assert contents(tmp_path / ".out.old") == contents(tmp_path / "out") == OLD


def test_an_output_that_somebody_made_while_the_old_one_lay_aside_is_not_decided_on(tmp_path):
    for name in (".out.old", "out", ".out.part"):
        make_old(tmp_path / name)
    with pytest.raises(OutputError, match=r"Delete the one that you do not want"):
        write(tmp_path / "out")
    for name in (".out.old", "out", ".out.part"):
        assert contents(tmp_path / name) == OLD


# ---- interruptions and errors


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interruption_keeps_what_is_finished_for_the_next_run(stop, tmp_path):
    def interrupt(name):
        if name == "c":
            raise stop

    with pytest.raises(stop):
        write(tmp_path / "out", before=interrupt)
    assert names(tmp_path) == [".out.journal", ".out.part"]
    assert write(tmp_path / "out") == ["c"]
    assert names(tmp_path) == ["out"]


def test_an_interruption_before_anything_is_finished_leaves_nothing(tmp_path):
    def interrupt(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", before=interrupt)
    assert names(tmp_path) == []


def test_an_error_leaves_nothing(tmp_path):
    def fail(name):
        if name == "c":
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        write(tmp_path / "out", before=fail)
    assert names(tmp_path) == []


def test_an_interruption_right_after_the_swap_leaves_the_new_output_alone(swap, tmp_path, monkeypatch):
    make_old(tmp_path / "out")
    sync = staging.sync

    def interrupt(path):
        if path == tmp_path:  # the part and its files come before the swap, the folder around them after it
            raise KeyboardInterrupt
        sync(path)

    monkeypatch.setattr(staging, "sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out")
    assert contents(tmp_path) == {f"out/{name}": data for name, data in NEW.items()}


def test_every_file_is_on_the_disk_before_the_output_has_its_name(tmp_path, monkeypatch):
    sync, calls = staging.sync, []

    def note(path):
        calls.append((path, (tmp_path / "out").exists()))
        sync(path)

    monkeypatch.setattr(staging, "sync", note)
    write(tmp_path / "out")
    part = tmp_path / ".out.part"
    assert set(calls[:-1]) == {(path, False) for path in (part, *(part / name for name in NEW))}
    assert calls[-1] == (tmp_path, True)


# ---- two runs


def test_a_second_run_to_the_same_output_is_refused_and_disturbs_nothing(tmp_path):
    with staged_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "a").write_bytes(b"mine")
        for _ in range(2):
            with pytest.raises(OutputBusyError, match="is locked by another run"):
                write(tmp_path / "x" / ".." / "out")
    assert contents(tmp_path / "out") == {"a": b"mine"}


def test_a_lock_ends_with_the_process_that_held_it(tmp_path):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with staged_folder(tmp_path / "out", overwrite=False):
            os.write(tell, b"x")
            signal.pause()
        os._exit(0)
    os.read(ready, 1)
    try:
        with pytest.raises(OutputBusyError):
            write(tmp_path / "out")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    write(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_a_journal_that_was_deleted_while_a_run_waited_for_it_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    place = Place(tmp_path / "out")
    place.journal.write_bytes(b"")
    flock = own_files.fcntl.flock

    def delete_first(descriptor, how):
        monkeypatch.setattr(own_files.fcntl, "flock", flock)
        place.journal.unlink()  # as the run that held it does at its end
        flock(descriptor, how)

    monkeypatch.setattr(own_files.fcntl, "flock", delete_first)
    journal = Journal(place.journal)
    with pytest.raises(OutputBusyError):
        Journal(place.journal)
    journal.close()


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(own_files.fcntl, "flock", refuse)
    write(tmp_path / "out")
    assert state(tmp_path / "out") == NEW


# ---- the swap


def test_two_folders_change_names_in_one_step_where_the_system_can(tmp_path):
    make_old(tmp_path / "first")
    (tmp_path / "second").mkdir()
    if not exchange(tmp_path / "first", tmp_path / "second"):
        pytest.skip("this file system cannot exchange folders")
    assert contents(tmp_path / "second") == OLD
    assert contents(tmp_path / "first") == {}
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "first", tmp_path / "nothing")


def test_a_link_at_the_outputs_place_is_replaced_and_what_it_leads_to_stays(swap, tmp_path):
    make_old(tmp_path / "elsewhere")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "out")
    assert not (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "elsewhere") == OLD
    assert names(tmp_path) == ["elsewhere", "out"]
