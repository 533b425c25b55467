"""A fleet from its file to its outputs, with the worker in this process."""

import json
import os
import shutil
from pathlib import Path

import pytest

from portllm.checkpoint.open import open_checkpoint
from portllm.errors import FleetFileError, OutputBusyError
from portllm.files.own_files import open_locked
from portllm.files.seal import seal_problem
from portllm.fleets.fleet import fleet, forecast_fleet, plan_fleet, run_fleet
from portllm.merging.merge import merge
from portllm.merging.options import MergeOptions
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from portllm.verifying.verify import verify
from tests.fleets.conftest import bytes_below


@pytest.fixture
def run(here):
    """Runs a fleet's file in this process; the statuses by cell, and the cells that were worked on."""

    def start(file, *, overwrite=False, dies=None):
        pool = here(dies)
        rows = run_fleet(plan_fleet(file, overwrite=overwrite), pool)
        return {row.folder: row for row in rows}, pool.jobs

    return start


def statuses(rows):
    return {folder: row.status for folder, row in rows.items()}


def test_each_output_is_what_the_commands_write_one_by_one(run, write, folder, monkeypatch):
    run(write(do='["port", "merge"]', more='[merge]\ndtype = "F32"'))
    monkeypatch.chdir(folder)
    base, evolved = open_checkpoint("base"), open_checkpoint("v3")
    ported = port(load_patch("adapters/b"), evolved=evolved, base=base, out=Path("alone"))
    merge(ported, into=evolved, out=Path("merge"), options=MergeOptions(dtype="F32"))
    assert bytes_below(folder / "out/v3/b/port") == bytes_below(folder / "alone")
    assert bytes_below(folder / "out/v3/b/merge") == bytes_below(folder / "merge")


def test_merging_alone_leaves_no_ported_patch(run, write, folder):
    run(write(do='["merge"]'))
    assert [path.name for path in (folder / "out/v2/a").iterdir()] == ["merge"]
    assert verify(folder / "out/v2/a/merge").verified


def test_what_is_uncertain_is_ported_with_its_verdict_beside_it(run, write, folder):
    rows, _ = run(write(do='["check", "port"]', evolved='["v2"]'))
    assert statuses(rows) == {"v2/a": "done", "v2/b": "done"}
    assert rows["v2/a"].facts["check"]["verdict"] == "uncertain"
    assert not rows["v2/a"].holds
    told = json.loads((folder / "out/v2/a/check/check.json").read_text())
    assert told["verdict"] == "uncertain"
    assert seal_problem(told) is None
    assert run(write(do='["check", "port"]', evolved='["v2"]'))[1] == []


def test_what_will_not_hold_is_not_ported(run, write, folder, misfit, tiny):
    shutil.copytree(tiny("base", seed=9), folder / "stranger")
    file = write(do='["check", "port"]', evolved='["stranger"]')
    rows, _ = run(file)
    assert set(statuses(rows).values()) == {"no"}
    assert rows["stranger/a"].facts["check"]["verdict"] == "will not hold"
    assert rows["stranger/misfit"].facts["check"]["verdict"] == "cannot be ported"
    assert "are unrelated to" in rows["stranger/a"].reason
    assert [path.name for path in (folder / "out/stranger/a").iterdir()] == ["check"]
    assert run(file)[1] == []


@pytest.mark.parametrize("full", ["false", "true"])
def test_several_patches_are_checked_with_the_reading_of_one(run, write, folder, monkeypatch, full):
    read = {}
    models = {file.stat().st_ino for name in ("base", "v2") for file in (folder / name).glob("*.safetensors")}

    def counted(name, real):
        def call(descriptor, *rest):
            found = real(descriptor, *rest)
            if os.fstat(descriptor).st_ino in models:
                read[output] = read.get(output, 0) + (len(found) if name == "pread" else found)
            return found

        return call

    for name in ("pread", "preadv"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    for output, patches in (("one", '["adapters/a"]'), ("two", '["adapters"]')):
        how = {"output": output, "patches": patches, "evolved": '["v2"]', "more": f"[check]\nfull = {full}"}
        rows, _ = run(write(do='["check"]', **how))
        assert set(statuses(rows).values()) == {"done"}
    assert len(rows) == 2
    assert read["two"] == read["one"] > 0


def test_one_that_does_not_fit_stops_no_other(run, write, misfit):
    rows, _ = run(write(evolved='["v2"]'))
    assert statuses(rows) == {"v2/a": "done", "v2/b": "done", "v2/misfit": "refused"}
    assert "down_proj" in rows["v2/misfit"].reason


def test_a_second_run_does_nothing_and_says_the_same(run, write, folder):
    first, _ = run(write())
    before = bytes_below(folder / "out")
    second, jobs = run(write())
    assert jobs == []
    assert all(row.kept for row in second.values())
    assert {name: row.facts for name, row in second.items()} == {name: row.facts for name, row in first.items()}
    assert bytes_below(folder / "out") == before


def test_a_second_run_does_what_is_missing_or_damaged(run, write, folder):
    run(write())
    shutil.rmtree(folder / "out/v2/a")
    (folder / "out/v3/a/port/adapter_model.safetensors").write_bytes(b"cut")
    record = folder / "out/v3/b/port/patch.json"
    record.write_text(record.read_text().replace("v3", "v9"))
    rows, jobs = run(write())
    assert jobs == ["v2/a", "v3/a", "v3/b"]
    assert set(statuses(rows).values()) == {"done"}
    assert all(verify(folder / "out" / name / "port").verified for name in rows)


def test_a_run_that_died_is_gone_on_with(here, write, folder):
    class Killed(here):
        def wait(self):
            if len(self.jobs) == 3:
                raise KeyboardInterrupt
            return super().wait()

    with pytest.raises(KeyboardInterrupt):
        run_fleet(plan_fleet(write()), Killed())
    # The last of the three was written, and the run died before it noted that.
    state = folder / "out" / "fleet.json"
    assert [row["status"] for row in json.loads(state.read_text())["cells"]] == ["done", "done", "done", "waiting"]
    pool = here()
    run_fleet(plan_fleet(write()), pool)
    assert pool.jobs == ["v3/b"]


def test_a_worker_that_dies_is_replaced_and_its_cell_done(run, write):
    rows, jobs = run(write(evolved='["v2"]'), dies={"v2/a": 1})
    assert jobs == ["v2/a", "v2/b", "v2/a"]
    assert rows["v2/a"].status == "done"
    assert rows["v2/a"].attempts == ("its worker died: killed by SIGKILL",)


def test_outputs_of_other_options_are_refused_and_replaced_only_when_told_to(run, write, folder):
    run(write(do='["port", "merge"]', evolved='["v2"]'))
    before = bytes_below(folder / "out/v2")
    rows, jobs = run(write(do='["port"]', evolved='["v2"]'))
    assert jobs == []
    assert set(statuses(rows).values()) == {"refused"}
    assert bytes_below(folder / "out/v2") == before
    rows, _ = run(write(do='["port"]', evolved='["v2"]'), overwrite=True)
    assert set(statuses(rows).values()) == {"done"}
    assert not (folder / "out/v2/a/merge").exists()


def test_a_changed_patch_is_another_input(run, write, folder, tiny):
    run(write(evolved='["v2"]'))
    shutil.rmtree(folder / "adapters/a")
    shutil.copytree(tiny("adapter", seed=9), folder / "adapters/a")
    rows, _ = run(write(evolved='["v2"]'))
    assert statuses(rows) == {"v2/a": "refused", "v2/b": "done"}


def test_what_somebody_else_wrote_is_not_replaced(run, write, folder):
    (folder / "out/v2/a").mkdir(parents=True)
    (folder / "out/v2/a/notes.txt").write_text("mine")
    rows, _ = run(write(evolved='["v2"]'))
    assert statuses(rows) == {"v2/a": "refused", "v2/b": "done"}
    assert (folder / "out/v2/a/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["out/v2", "out/v2/a"])
def test_a_cell_is_not_written_through_a_link_below_the_output(place, run, write, folder):
    (folder / "mine").mkdir()
    (folder / place).parent.mkdir(parents=True)
    (folder / place).symlink_to(folder / "mine")
    rows, _ = run(write(evolved='["v2"]'), overwrite=True)
    assert rows["v2/a"].status == "failed"
    assert "is a link" in rows["v2/a"].reason
    assert bytes_below(folder / "mine") == {}


def test_an_output_that_no_longer_counts_is_kept_where_the_cell_reads_it(run, write, folder):
    shutil.copytree(folder / "adapters/a", folder / "out/v2/merge/merge")
    before = bytes_below(folder / "out/v2/merge")
    rows, _ = run(write(patches='["out/v2/merge"]', evolved='["v2"]'), overwrite=True)
    assert "which is an input" in rows["v2/merge"].reason
    assert bytes_below(folder / "out/v2/merge") == before


def test_patches_whose_names_differ_in_letters_only_are_refused_where_the_output_cannot_tell_them(write, folder):
    shutil.copytree(folder / "adapters/a", folder / "adapters/A")
    assert len(plan_fleet(write(evolved='["v2"]')).cells) == 3
    (folder / "out").mkdir()
    (folder / "OUT").symlink_to("out")  # as a file system that ignores case shows it
    with pytest.raises(FleetFileError, match="would both be written to 'a'"):
        plan_fleet(write(evolved='["v2"]'))


def test_a_model_that_changes_while_the_fleet_runs_is_noticed(here, write, folder, tiny):
    plan = plan_fleet(write(evolved='["v2"]'))
    shutil.copy(tiny("evolved", seed=77) / "model.safetensors", folder / "v2" / "model.safetensors")
    rows = run_fleet(plan, here())
    assert {row.status for row in rows} == {"failed"}
    assert "when the fleet was planned" in rows[0].reason


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(here, write, folder, misfit):
    rows = forecast_fleet(plan_fleet(write(do='["merge"]', evolved='["v2"]')), here())
    assert [row.status for row in rows] == ["done", "done", "refused"]
    assert rows[0].facts["merge"]["bytes"] > 0
    assert not (folder / "out").exists()


def test_a_dry_run_says_of_a_patch_that_does_not_fit_what_the_check_will_say(here, run, write, misfit):
    file = write(do='["check", "port"]', evolved='["v2"]')
    forecast = {row.folder: row for row in forecast_fleet(plan_fleet(file), here())}
    rows, _ = run(file)
    said, done = forecast["v2/misfit"], rows["v2/misfit"]
    assert done.facts["check"]["verdict"] == "cannot be ported"
    assert (said.status, said.reason, said.facts) == (done.status, done.reason, done.facts)


def test_everything_that_is_not_there_is_named_at_once(write, folder):
    file = write(patches='["adapters/x", "nothing/*"]', evolved='["v2", "v9", "s3://bucket/v4"]')
    with pytest.raises(FleetFileError) as refused:
        plan_fleet(file)
    assert [said in str(refused.value) for said in ("'adapters/x'", "'nothing/*'", "'v9'", "'s3://bucket/v4'")] == [
        True
    ] * 4


def test_two_patches_of_one_name_are_refused(write, folder):
    shutil.copytree(folder / "adapters/a", folder / "others/a")
    with pytest.raises(FleetFileError, match="would both be written to 'a'"):
        plan_fleet(write(patches='["adapters", "others"]'))


def test_a_patch_that_two_patterns_find_is_one(write, folder):
    plan = plan_fleet(write(patches='["adapters", "adapters/a"]', evolved='["v2"]'))
    assert [cell.patch.name for cell in plan.cells] == ["a", "b"]


def test_a_glob_names_patches_by_what_differs(write, folder):
    for team in ("red", "blue"):
        shutil.copytree(folder / "adapters/a", folder / "teams" / team / "final")
    plan = plan_fleet(write(patches='["teams/*/final"]', evolved='["v2"]'))
    assert [cell.folder for cell in plan.cells] == ["v2/blue--final", "v2/red--final"]


def test_a_second_run_at_the_same_time_is_refused(here, write, folder):
    (folder / "out").mkdir()
    open_locked(folder / "out/.fleet.lock", wait=False)
    with pytest.raises(OutputBusyError, match="is locked by another run"):
        run_fleet(plan_fleet(write()), here())


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": 1, "cells": []}', '{"format": 1, "cells": 3, "seal": "x"}']
)
def test_a_damaged_state_is_told_and_not_guessed_at(run, write, folder, text):
    run(write())
    (folder / "out/fleet.json").write_text(text)
    with pytest.raises(FleetFileError, match="fleet.json': is corrupt"):
        plan_fleet(write())


def test_processes_of_this_machine_do_the_same_and_one_that_is_killed_is_replaced(run, write, folder, trap):
    run(write(output="here"))
    rows = fleet(write(), workers=2)
    assert [row.reason for row in rows if row.status != "done"] == []
    assert [row.attempts for row in rows if row.attempts] == [("its worker died: killed by SIGKILL",)]
    for name in ("v2/a", "v2/b", "v3/a", "v3/b"):
        assert bytes_below(folder / "out" / name) == bytes_below(folder / "here" / name)
