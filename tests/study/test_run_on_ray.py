"""A study on a Ray cluster that the test starts on this machine: its tables are those of a run in this process."""

from pathlib import Path

import pytest

import portllm
from portllm.study.run import run_study, study_status
from tests.clusters import spring_once
from tests.study.small import write_study

pytestmark = pytest.mark.slow

SHORT = {"seeds = [0, 1]": "seeds = [0]", "links = 2": "links = 1"}


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """The first worker process that opens weights of an evolved model is killed as it does."""
    place = tmp_path / "trap"
    place.mkdir()
    condition = "'/on-ray/evolve/' in name and name.endswith('.safetensors')"
    (place / "sitecustomize.py").write_text(spring_once(place, condition))
    monkeypatch.setenv("PYTHONPATH", f"{place}:{Path(portllm.__file__).parents[1]}")
    return place / "sprung"


def run(folder, name, **options):
    """Run the study in a folder to an output; the names of the steps done, and the bytes of its table."""
    names = []
    run_study(
        folder / "small.toml",
        out=folder / name,
        data=folder,
        device="cpu",
        on_step=lambda told: names.append(told.step.name),
        **options,
    )
    return names, (folder / name / "results.json").read_bytes()


def test_a_study_on_two_workers_gives_the_table_of_one_process(environment, reader, tmp_path, monkeypatch):
    write_study(tmp_path, reader, top="keep = []")
    names, table = run(tmp_path, "in-turn")
    monkeypatch.chdir(tmp_path)  # where the study's folder has a relative name
    shared, on_ray = run(Path(), "on-ray", ray="local", workers=2)
    assert on_ray == table
    assert sorted(shared) == sorted(names)
    assert shared != names  # they overtook each other
    assert list((tmp_path / "on-ray").rglob("*.safetensors")) == []
    assert run(tmp_path, "on-ray") == ([], table)  # and either kind of run goes on with the other's


def test_a_worker_that_is_killed_on_the_way_is_replaced(trap, cluster, reader, tmp_path):
    write_study(tmp_path, reader, replace=SHORT)
    _, table = run(tmp_path, "in-turn")
    names, on_ray = run(tmp_path, "on-ray", ray=cluster.address)
    assert trap.exists()
    assert on_ray == table
    assert len(names) == len(set(names)) == study_status(tmp_path / "small.toml", out=tmp_path / "on-ray").n_steps
