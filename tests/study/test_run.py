"""A study is run, killed, gone on with and changed, and the table is always that of its file."""

import functools
import json
import shutil
import signal

import pytest
import torch

from portllm.errors import DataError, OutputBusyError, OutputError, OutputExistsError
from portllm.evaluating.scoring import score
from portllm.study.run import _locked, run_study, study_results, study_status
from portllm.study.schedule.machine import describe_machine
from portllm.study.schedule.work import StepRunner
from tests.processes import die, in_child
from tests.study.small import write_study


@pytest.fixture(scope="module")
def folder(reader, tmp_path_factory):
    """A study that has been run; read it, do not write to it."""
    folder = tmp_path_factory.mktemp("study")
    file = write_study(folder, reader)
    names = []
    run_study(file, out=folder / "out", data=folder, device="cpu", on_step=lambda told: names.append(told.step.name))
    (folder / "names.json").write_text(json.dumps(names))
    return folder


@pytest.fixture
def again(folder, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(folder, tmp_path / "again")


def run(folder, **options):
    """The names of the steps that were done, and the results."""
    names = []
    results = run_study(
        folder / "small.toml",
        out=folder / "out",
        data=folder,
        device="cpu",
        on_step=lambda told: names.append(told.step.name),
        **options,
    )
    return names, results


def table(folder):
    return (folder / "out" / "results.json").read_text()


def test_every_step_is_done_once_and_the_table_is_whole(folder):
    names = json.loads((folder / "names.json").read_text())
    assert len(names) == len(set(names)) == study_status(folder / "small.toml", out=folder / "out").n_steps
    results = json.loads(table(folder))
    assert results["n_done"] == results["n_steps"] == len(names)
    assert [(row["evolution"], row["link"]) for row in results["tasks"]] == [("chain", 1), ("chain", 2)]
    for row in results["tasks"]:
        assert list(row["scored"]) == ["base", "patched", "evolved", "ported", "retrained"]
        assert row["seeds"] == [0, 1]
        assert len(row["scored"]["ported"]["by_seed"]) == 2
        assert row["scored"]["patched"] == results["tasks"][0]["scored"]["patched"]
    for row in results["models"]:
        assert 0 < row["drift"] < 1
        assert row["old_loss"][0] != row["old_loss"][1]
    assert results["models"][1]["drift"] > results["models"][0]["drift"]
    assert json.loads((folder / "out" / "machine.json").read_text()) == describe_machine()


def test_a_second_run_does_nothing_and_status_and_report_agree(again):
    before = table(again)
    assert run(again)[0] == []
    assert table(again) == before
    status = study_status(again / "small.toml", out=again / "out")
    assert (status.left.steps, status.left.seconds) == ((), 0.0)
    assert status.seconds > 0
    assert study_results(again / "small.toml", out=again / "out").to_json() == json.loads(before)


@pytest.mark.parametrize(("top", "dtype"), [("", torch.float32), ('dtype = "auto"\n', torch.bfloat16)])
def test_models_are_scored_in_float32_where_the_study_does_not_say_otherwise(again, reader, monkeypatch, top, dtype):
    monkeypatch.setattr("portllm.running.model.compute_dtype", lambda stored, device: torch.bfloat16)
    seen = []

    def noting(model, *given, **named):
        seen.append(next(model.parameters()).dtype)
        return score(model, *given, **named)

    monkeypatch.setattr("portllm.study.schedule.tasks.score", noting)
    write_study(again, reader, top=top, replace={"score_rows = 9": "score_rows = 8"})
    run(again)
    assert set(seen) == {dtype}


def test_a_folder_of_results_with_a_link_in_it_is_not_written_to(again, tmp_path):
    (tmp_path / "mine").mkdir()
    shutil.rmtree(again / "out" / "steps")
    (again / "out" / "steps").symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match="steps': is a link"):
        run(again)
    assert not any((tmp_path / "mine").iterdir())


def test_a_run_that_is_killed_three_times_gives_the_same_table(reader, tmp_path):
    short = {"seeds = [0, 1]": "seeds = [0]", "links = 2": "links = 1"}
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    write_study(tmp_path / "whole", reader, replace=short)
    file = write_study(tmp_path / "killed", reader, replace=short)
    run(tmp_path / "whole")
    counts = []
    for number, moment in ((4, "after"), (3, "within"), (7, "after")):
        assert in_child(functools.partial(run_and_die, tmp_path / "killed", number, moment)) == -signal.SIGKILL
        status = study_status(file, out=tmp_path / "killed" / "out")
        counts.append(status.n_steps - len(status.left.steps))
        assert status.left.seconds > 0
    assert counts == [3, 5, 11]  # the step in which a run dies is not done
    run(tmp_path / "killed")
    assert table(tmp_path / "killed") == table(tmp_path / "whole")


def run_and_die(folder, number, moment):
    """Run, and die in a step: within its work, or when its output is there and its record is not."""
    work, begun = StepRunner.do, 0

    def do(self, step):
        nonlocal begun
        begun += 1
        result = work(self, step)
        if begun == number:
            die()
        return result

    def within(label, done, total, unit):
        if moment == "within" and begun == number:
            die()

    StepRunner.do = do
    run(folder, progress=within)


@pytest.mark.slow
def test_what_a_change_touches_is_done_again_and_nothing_else(again, reader):
    write_study(again, reader, replace={"score_rows = 9": "score_rows = 8"})
    names, results = run(again)
    assert {name.partition("_")[0] for name in names} == {"score"}
    assert results.tasks[0].scored["base"].accuracy.n_rows == 8
    write_study(again, reader, replace={"score_rows = 9": "score_rows = 8", "links = 2": "links = 3"})
    names, _ = run(again)
    assert all("chain" in name for name in names)  # each link now reads every third text
    write_study(
        again,
        reader,
        replace={"score_rows = 9": "score_rows = 8", "links = 2": "links = 3", "seeds = [0, 1]": "seeds = [0, 1, 2]"},
    )
    names, _ = run(again)
    assert all("_s2" in name for name in names)


@pytest.mark.slow
def test_another_method_and_another_retraining_are_added_to_what_is_done(again, reader):
    write_study(again, reader, top='methods = ["add", "random"]\nretrain_seeds = [2]\n')
    names, results = run(again)
    trained = {
        f"{kind}_chain.{link}_kinds_s2{end}"
        for kind, end in (("train", ""), ("score", "_retrained"))
        for link in (1, 2)
    }
    assert {name for name in names if not name.endswith("_random")} == trained
    assert len(names) == len(trained) + 2 * 2 * 2  # ported and scored, on two models, with two seeds
    assert all(row.luck is not None for row in results.tasks)


@pytest.mark.slow
def test_a_control_is_made_and_patches_are_checked_where_a_study_that_goes_on_asks_for_it(again, reader):
    write_study(again, reader, more='[evolutions.twin]\nkind = "twin"\n[check]\nprompts = 4\nmax_tokens = 48\n')
    names, results = run(again)
    kinds = {name.partition("_")[0] for name in names if "twin" not in name}
    assert kinds == {"check"}
    twin = next(row for row in results.tasks if row.evolution == "twin")
    base, same = twin.scored["base"].loss.value, twin.scored["evolved"].loss.value
    assert same == pytest.approx(base, abs=0.02)
    assert twin.scored["ported"].loss.value > twin.scored["patched"].loss.value
    assert set(twin.checked.verdicts) == {"will not hold"}
    assert twin.checked.weights["drift"] == pytest.approx(2**0.5, rel=0.2)
    assert twin.checked.text["update_kl"] < 1e-3
    near = next(row for row in results.tasks if row.evolution == "chain")
    assert near.checked.weights["drift"] < twin.checked.weights["drift"] / 2
    assert near.checked.text["update_kl"] > twin.checked.text["update_kl"]


def test_damaged_outputs_are_made_again(again):
    shutil.rmtree(again / "out" / "port" / "port_chain.2_kinds_s0_add")
    assert run(again)[0] == []  # nothing that is left needs it
    file = next((again / "out" / "train" / "train_base_kinds_s1").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    names, _ = run(again)
    assert names == ["train_base_kinds_s1"]  # and what depends on it proved to be the same
    (again / "out" / "steps" / "drift_chain.2.json").write_text("{")
    assert run(again)[0] == ["drift_chain.2"]


@pytest.mark.slow
def test_outputs_that_no_step_needs_are_dropped_where_the_study_says_so(reader, tmp_path, folder):
    file = write_study(tmp_path, reader, top="keep = []")
    most = []
    run_study(
        file,
        out=tmp_path / "out",
        data=tmp_path,
        device="cpu",
        on_step=lambda told: most.append(len(list((tmp_path / "out" / "evolve").glob("*/model.safetensors")))),
    )
    assert max(most) == 1  # a link is gone when the next one is made
    assert [path.name for path in (tmp_path / "out").rglob("*.safetensors")] == []
    assert table(tmp_path) == table(folder)
    write_study(tmp_path, reader, top="keep = []", replace={"seeds = [0, 1]": "seeds = [0, 1, 2]"})
    names, _ = run(tmp_path)
    assert {name for name in names if "_s2" not in name} == {"evolve_chain.1", "evolve_chain.2"}


def test_a_report_is_made_of_what_is_done(again):
    for name in ("score_chain.2_kinds_s1_add", "drift_chain.2"):
        (again / "out" / "steps" / f"{name}.json").unlink()
    results = study_results(again / "small.toml", out=again / "out")
    assert results.n_steps - results.n_done == 2
    assert [row.seeds for row in results.tasks] == [(0, 1), (0,)]
    assert results.models[1].drift is None


def test_data_that_is_not_there_is_told_before_any_step(again):
    with pytest.raises(DataError, match="rows.jsonl': does not exist. Pass the folder that contains it with --data"):
        run_study(again / "small.toml", out=again / "new", device="cpu")
    assert not (again / "new" / "steps").exists()


def test_two_runs_to_one_folder_exclude_each_other(again):
    with _locked(again / "out"), pytest.raises(OutputBusyError):
        run(again)


def test_a_folder_of_something_else_is_left_alone(again):
    other = again / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="is not a study's folder"):
        run_study(again / "small.toml", out=other, data=again, device="cpu")
    assert [file.name for file in other.iterdir()] == ["notes.txt"]
