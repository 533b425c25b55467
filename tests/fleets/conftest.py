"""A fleet of tiny patches and models, and a pool that needs no other process."""

import shutil
from collections import deque
from pathlib import Path

import pytest

import portllm
from portllm.fleets.cell import CellWorker
from portllm.workers.pool import Finished, Lost, Pool
from tests.clusters import cluster, environment, spring_once  # noqa: F401 (fixtures)


class Here(Pool):
    """A pool of one worker in this process. `dies` says how often the worker of a cell is lost before it works."""

    def __init__(self, dies=None):
        self.worker, self.waiting, self.jobs = CellWorker(), deque(), []
        self.dies = dict(dies or {})

    @property
    def free(self):
        return 1 - len(self.waiting)

    def submit(self, number, job):
        self.waiting.append((number, job))

    def wait(self):
        number, job = self.waiting.popleft()
        self.jobs.append(job["folder"])
        if self.dies.get(job["folder"], 0):
            self.dies[job["folder"]] -= 1
            return Lost(number, "its worker died: killed by SIGKILL")
        return Finished(number, self.worker.do(job))

    def close(self):
        pass


@pytest.fixture
def here():
    return Here


@pytest.fixture
def folder(tiny, tmp_path):
    """A folder with a base, two evolved models, and two adapters of the base in a folder of their own."""
    (tmp_path / "adapters").mkdir()
    for name, source in {
        "base": tiny("base"),
        "v2": tiny("evolved"),
        "v3": tiny("evolved", seed=5),
        "adapters/a": tiny("adapter"),
        "adapters/b": tiny("adapter", seed=2),
    }.items():
        shutil.copytree(source, tmp_path / name)
    return tmp_path


@pytest.fixture
def misfit(tiny, folder):
    """An adapter beside the others that fits no model of the fleet."""
    shutil.copytree(tiny("adapter", of=tiny("base", inner=24)), folder / "adapters" / "misfit")


@pytest.fixture
def write(folder):
    """`write(output="elsewhere")` writes the fleet's file, with other values where they are given."""

    def run(*, patches='["adapters"]', evolved='["v2", "v3"]', do='["port"]', output="out", more=""):
        file = folder / "fleet.toml"
        head = f'patches = {patches}\nevolved = {evolved}\nbase = "base"\ndo = {do}\noutput = "{output}"\n'
        file.write_text(head + more)
        return file

    return run


@pytest.fixture
def trap(folder, monkeypatch):
    """The first worker process, of ours or of Ray's, that opens a file of patch b is killed as it does."""
    place = folder / "trap"
    place.mkdir()
    (place / "sitecustomize.py").write_text(spring_once(place, "'/adapters/b/' in name"))
    monkeypatch.setenv("PYTHONPATH", f"{place}:{Path(portllm.__file__).parents[1]}")


def bytes_below(folder):
    """The content of every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
