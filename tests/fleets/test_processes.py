"""Worker processes of this machine: what they say, how they end."""

from pathlib import Path

import psutil
import pytest

import portllm
from portllm.fleets import processes
from portllm.fleets.processes import Processes, fitting_workers
from portllm.workers.pool import Finished, Lost

NOWHERE = {
    "folder": "v2/a",
    "base": None,
    "evolved": {"place": "nowhere", "said": "nowhere"},
    "steps": ["port"],
    "options": {},
    "dry": False,
}
SOURCE = str(Path(portllm.__file__).parents[1])


@pytest.fixture(autouse=True)
def source(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", SOURCE)


def test_a_worker_answers_one_job_after_another():
    with Processes(1) as pool:
        for number in (3, 4):
            assert pool.free == 1
            pool.submit(number, NOWHERE)
            assert pool.free == 0
            ended = pool.wait()
            assert isinstance(ended, Finished)
            assert ended.number == number
            assert "no such file or folder" in ended.result["reason"]


def test_leaving_the_pool_ends_its_workers_whatever_they_are_doing():
    before = set(psutil.Process().children())
    with Processes(2) as pool:
        pool.submit(0, NOWHERE)
        pool.submit(1, NOWHERE)
        pool.wait()
        assert len(set(psutil.Process().children()) - before) == 2
    assert set(psutil.Process().children()) <= before


def test_a_worker_that_cannot_start_says_why(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nsys.stderr.write('no memory\\n')\nos._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{SOURCE}")
    with Processes(1) as pool:
        pool.submit(5, NOWHERE)
        assert pool.wait() == Lost(5, "its worker died: exit status 7: no memory")
        assert pool.free == 1


@pytest.mark.parametrize(
    ("memory", "cores", "jobs", "workers"),
    [(64, 8, 100, 8), (3.5, 8, 100, 3), (0.1, 8, 100, 1), (64, 8, 2, 2), (64, 8, 0, 1)],
)
def test_workers_fit_the_cores_the_memory_and_the_jobs(monkeypatch, memory, cores, jobs, workers):
    monkeypatch.setattr(processes, "_free_memory", lambda: int(memory * 10**9))
    monkeypatch.setattr(processes.os, "cpu_count", lambda: cores)
    assert fitting_workers(("port", "merge"), jobs) == workers
