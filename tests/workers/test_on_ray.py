"""Actors of a cluster, whatever their work; fleets and studies on Ray are tested with them."""

import os
from pathlib import Path

import pytest

from portllm.errors import WorkersError
from portllm.workers.on_ray import ClusterRequest, Machine, OnRay

pytestmark = pytest.mark.slow


class Where:
    """A worker that says where it works."""

    def do(self, job):
        return {"folder": os.getcwd(), "threads": os.environ["OMP_NUM_THREADS"], **job}


def test_relative_names_mean_on_a_worker_what_they_mean_here(environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # a worker finds the class by its module's name
    seen = []

    def share(machines):
        seen.extend(machines)
        return ClusterRequest(1, cores=2)

    with OnRay("local", Where, share, own_cores=2) as pool:
        while not pool.free:
            pool.wait()
        pool.submit(7, {"step": "a"})
        ended = pool.wait()
    assert seen == [Machine(2, 0)]
    assert (ended.number, ended.result) == (7, {"folder": str(tmp_path), "threads": "2", "step": "a"})


def test_a_share_that_cannot_be_had_leaves_the_cluster_for_the_next(cluster):
    def refuse(machines):
        raise WorkersError(f"{len(machines)} machines are too few")

    for _ in range(2):  # the first has let go of it
        with pytest.raises(WorkersError, match="2 machines are too few"):
            OnRay(cluster.address, Where, refuse)


def test_an_address_where_no_cluster_is_is_told(environment):
    with pytest.raises(WorkersError, match="--ray 127.0.0.1:1: .*Start a cluster"):
        OnRay("127.0.0.1:1", Where, lambda machines: ClusterRequest(1))
