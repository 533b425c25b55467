"""A worker does a step as the run itself would, and refuses to where it would come out otherwise."""

from dataclasses import replace

import pytest

from portllm.files.kept_results import read_record, versions
from portllm.study.definition.file import read_study
from portllm.study.schedule import shared
from portllm.study.schedule.ledger import Ledger
from portllm.study.schedule.places import Places
from portllm.study.schedule.shared import leave_mark
from portllm.study.schedule.work import open_inputs
from portllm.study.schedule.worker import Assignment, StepWorker
from tests.study.small import write_study


@pytest.fixture
def study(reader, tmp_path, monkeypatch):
    """An assignment, and a job of it: to score the base."""
    monkeypatch.setattr(shared, "PATIENCE_SECONDS", 0.0)
    values = read_study(write_study(tmp_path, reader))
    out = tmp_path / "out"
    out.mkdir()
    ledger = Ledger(values, Places(out), open_inputs(values, tmp_path).identities())
    step = next(step for step in ledger.steps if step.name == "score_base_kinds")
    assignment = Assignment(values, out, leave_mark(out), tmp_path, "cpu", ledger.identities, versions())
    return assignment, {"step": step.name, "inputs": ledger.inputs_of(step)}


def test_a_record_counts_for_the_run_that_asked_for_it(study):
    assignment, job = study
    result = StepWorker(assignment).do(job)
    ledger = Ledger(assignment.study, Places(assignment.out), assignment.identities)
    assert list(ledger.done()) == ["score_base_kinds"]
    assert ledger.done()["score_base_kinds"].result == result["record"]["result"]


def test_another_folder_of_the_same_name_is_told_and_left_alone(study):
    assignment, job = study
    StepWorker(assignment).do(job)
    result = StepWorker(replace(assignment, mark="another")).do(job)
    assert "this is not the study's folder" in result["reason"]
    assert not result["can_pass"]
    assert read_record(assignment.out / "steps" / "score_base_kinds.json") is not None


def test_other_data_are_told(study):
    assignment, job = study
    with (assignment.data / "text.jsonl").open("a") as file:
        file.write('{"text": "a row more"}\n')
    assert "base or data differ from those of this run" in StepWorker(assignment).do(job)["reason"]


def test_another_version_of_a_program_is_told(study):
    assignment, job = study
    other = replace(assignment, versions={**versions(), "peft": "0.0.1"})
    assert f"has peft {versions()['peft']}, but this run has 0.0.1" in StepWorker(other).do(job)["reason"]


def test_a_bug_is_told_with_its_traceback(study, monkeypatch):
    assignment, job = study
    monkeypatch.setattr("portllm.study.schedule.work.StepRunner.do", lambda self, step: {"x": 1 / 0})
    assert "ZeroDivisionError" in StepWorker(assignment).do(job)["reason"]
