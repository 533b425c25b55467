"""Steps side by side, in any order in which they can end: what one reads is there, and the table is always the same.

The steps' work is faked: an output is a file that says what it was made of.
"""

import random

import pytest
from blake3 import blake3

from portllm.errors import NotFoundError, OutputError, StudyStepError
from portllm.files.kept_results import read_record, versions
from portllm.study.definition.plan import Identities
from portllm.study.definition.settings import Evolution, HarnessTask, Study
from portllm.study.schedule import shared
from portllm.study.schedule.ledger import Ledger
from portllm.study.schedule.places import Places
from portllm.study.schedule.side_by_side import RETRIES, do_side_by_side
from portllm.study.schedule.worker import Assignment, StepWorker
from portllm.training.evolve import EvolveSettings
from portllm.training.evolve_lora import LoraEvolveSettings
from portllm.workers.pool import Finished, Lost, Pool

STUDY = Study(
    title="A study",
    base="base-v1",
    seeds=(0,),
    tasks={"a": HarnessTask(name="a")},
    evolutions={
        "chain": Evolution(text="t.jsonl", links=2, settings=LoraEvolveSettings()),
        "whole": Evolution(text="t.jsonl", settings=EvolveSettings()),
    },
    keep=(),
)


class FakeWork:
    """Writes for each step what it read; it fails where what it reads is not there."""

    def __init__(self, places):
        self.places = places
        self.wrong = {}

    def do(self, step):
        read = [(self.places.folder(name) / "made-of").read_text() for name in step.inputs]
        if step.name in self.wrong:
            raise self.wrong[step.name]
        made_of = blake3(repr((step.name, read)).encode()).hexdigest()
        if step.makes:
            self.places.folder(step.name).mkdir(parents=True, exist_ok=True)
            (self.places.folder(step.name) / "made-of").write_text(made_of)
        return {"made_of": made_of}


class AtOnce(Pool):
    """Workers in this process: a job's work is done as late as can be, when it ends, in an order that a seed draws."""

    def __init__(self, ledger, *, workers, seed=0, dies=None):
        self.work = FakeWork(ledger.places)
        assignment = Assignment(STUDY, ledger.places.out, "", None, "cpu", ledger.identities, versions())
        self.worker = StepWorker(assignment)
        self.worker.__dict__["_work"] = self.work
        self.random, self.workers, self.running, self.begun = random.Random(seed), workers, {}, []
        self.dies = dict(dies or {})

    @property
    def free(self):
        return self.workers - len(self.running)

    def submit(self, number, job):
        assert self.free > 0
        assert number not in self.running
        self.running[number] = job
        self.begun.append(job["step"])

    def wait(self):
        number = self.random.choice(sorted(self.running))
        job = self.running.pop(number)
        if self.dies.get(job["step"], 0):
            self.dies[job["step"]] -= 1
            return Lost(number, "its worker died: killed")
        return Finished(number, self.worker.do(job))

    def close(self):
        pass


@pytest.fixture(autouse=True)
def faked(monkeypatch):
    def identify(self, step):
        file = self.folder(step.name) / "made-of"
        if step.makes and not file.exists():
            raise NotFoundError(f"'{file}': does not exist.")
        return file.read_text() if step.makes else ""

    monkeypatch.setattr(Places, "identify", identify)
    monkeypatch.setattr(shared, "PATIENCE_SECONDS", 0.0)


def ledger_in(folder):
    data = {name: name for name in ("train a", "score a", "text chain", "text whole")}
    return Ledger(STUDY, Places(folder), Identities("s4k1:base", data))


def run(ledger, pool):
    """Do what is left; the steps in the order in which they ended, and the most models that were there at a time."""
    ended, most = [], 0

    def note(step, record, workers):
        nonlocal most
        assert workers == pool.workers
        ended.append(step.name)
        most = max(most, len(list(ledger.places.out.glob("evolve/*"))))
        ledger.drop()

    do_side_by_side(ledger, pool, note=note)
    return ended, most


def found(ledger):
    return {step.name: result["made_of"] for step, result in ledger.results().items()}


@pytest.fixture
def in_turn(tmp_path):
    """What the steps find one after the other."""
    ledger = ledger_in(tmp_path / "in-turn")
    work = FakeWork(ledger.places)
    while left := ledger.left():
        ledger.do(left[0], lambda step=left[0]: work.do(step))
    return found(ledger)


@pytest.mark.parametrize(("workers", "seed"), [(1, 0), (2, 0), (2, 1), (2, 2), (5, 0), (5, 1), (5, 2)])
def test_in_any_order_each_step_is_done_once_with_what_it_reads(in_turn, tmp_path, workers, seed):
    ledger = ledger_in(tmp_path / "out")
    ended, most = run(ledger, AtOnce(ledger, workers=workers, seed=seed))
    assert sorted(ended) == sorted(in_turn)
    assert found(ledger) == found(ledger_in(tmp_path / "out")) == in_turn
    assert list((tmp_path / "out").rglob("made-of")) == []  # nothing is kept
    assert most <= (2 if workers == 1 else 3)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_was_cut_off_is_gone_on_with(in_turn, tmp_path, seed):
    ledger = ledger_in(tmp_path / "out")
    noted = []

    def note(step, record, workers):
        ledger.drop()
        noted.append(step.name)
        if len(noted) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do_side_by_side(ledger, AtOnce(ledger, workers=3, seed=seed), note=note)
    rest = ledger_in(tmp_path / "out")
    ended, _ = run(rest, AtOnce(rest, workers=3, seed=seed + 1))
    assert found(rest) == in_turn
    again = set(ended) & set(noted)
    assert {name.partition("_")[0] for name in again} <= {"evolve", "train", "port"}  # what was dropped, and needed


def test_a_step_whose_worker_died_is_tried_again(in_turn, tmp_path):
    ledger = ledger_in(tmp_path / "out")
    pool = AtOnce(ledger, workers=2, dies={"evolve_chain.2": RETRIES})
    run(ledger, pool)
    assert found(ledger) == in_turn
    assert pool.begun.count("evolve_chain.2") == RETRIES + 1


def test_a_step_that_loses_its_worker_too_often_ends_the_run(tmp_path):
    ledger = ledger_in(tmp_path / "out")
    with pytest.raises(StudyStepError, match=r"^evolve_chain.1: its worker died: killed$"):
        run(ledger, AtOnce(ledger, workers=2, dies={"evolve_chain.1": RETRIES + 1}))


@pytest.mark.parametrize(
    ("error", "said"), [(NotFoundError("no model."), "no model."), (ZeroDivisionError("a bug"), "Traceback")]
)
def test_a_step_that_fails_begins_no_other_and_those_that_run_are_kept(tmp_path, error, said):
    ledger = ledger_in(tmp_path / "out")
    pool = AtOnce(ledger, workers=4)
    pool.work.wrong["train_base_a_s0"] = error
    with pytest.raises(StudyStepError, match=f"^train_base_a_s0: {said}"):
        run(ledger, pool)
    assert pool.running == {}
    assert pool.begun.count("train_base_a_s0") == 1
    assert sorted(found(ledger)) == sorted(set(pool.begun) - {"train_base_a_s0"})


def test_a_record_that_is_not_seen_here_is_told(tmp_path):
    ledger = ledger_in(tmp_path / "out")
    pool = AtOnce(ledger, workers=1)
    pool.worker = StepWorker(Assignment(STUDY, tmp_path / "there", "", None, "cpu", ledger.identities, versions()))
    pool.worker.__dict__["_work"] = FakeWork(Places(tmp_path / "there"))
    with pytest.raises(OutputError, match="on a file system that all machines share"):
        run(ledger, pool)
    assert not any(read_record(ledger.places.record_file(step)) for step in ledger.steps)
