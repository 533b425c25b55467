"""A fleet on a Ray cluster that the test starts on this machine."""

import os
from pathlib import Path

import pytest

import portllm
from portllm.errors import WorkersError
from portllm.many.fleet import fleet, open_pool, plan_fleet, run_fleet
from portllm.many.on_ray import OnRay
from tests.many.conftest import bytes_below

pytestmark = pytest.mark.slow


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(portllm.__file__).parents[1]), prepend=os.pathsep)


@pytest.fixture
def cluster(environment):
    """Two nodes with one core each, as two machines would be; ends with the test."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    started.add_node(num_cpus=1)
    yield started
    started.shutdown()


def outputs(folder):
    return {name: data for name, data in bytes_below(folder).items() if "/" in name}


def test_a_cluster_of_its_own_writes_what_processes_write(environment, write, folder):
    steps = '["port", "merge"]'
    fleet(write(do=steps, output="here"), workers=1)
    rows = fleet(write(do=steps), ray="local", workers=2)
    assert [row.reason for row in rows if row.status != "done"] == []
    assert outputs(folder / "out") == outputs(folder / "here")


def test_a_worker_that_is_killed_on_the_way_is_replaced(trap, cluster, here, write, folder):
    run_fleet(plan_fleet(write(output="here")), here())
    rows = fleet(write(), ray=cluster.address)
    assert [row.reason for row in rows if row.status != "done"] == []
    assert [len(row.attempts) for row in rows if row.attempts] == [1]
    assert outputs(folder / "out") == outputs(folder / "here")


def test_a_machine_that_goes_on_the_way_costs_a_try_and_no_cell(cluster, write, folder):
    plan = plan_fleet(write())
    with open_pool(plan, workers=2, ray=cluster.address) as pool:
        while pool.free < 2:
            pool.wait()
        cluster.remove_node(next(iter(cluster.worker_nodes)))
        rows = run_fleet(plan, pool)
    assert [row.reason for row in rows if row.status != "done"] == []


def test_a_bug_on_a_worker_is_a_row_and_stops_no_other(environment, write, folder):
    plan = plan_fleet(write())
    (folder / "adapters/a/adapter_config.json").unlink()
    with open_pool(plan, workers=1, ray="local") as pool:
        rows = run_fleet(plan, pool)
    assert [row.status for row in rows] == ["failed", "done", "failed", "done"]
    assert all("no adapter_config.json" in row.reason for row in rows if row.status == "failed")


def test_an_address_where_no_cluster_is_is_told(environment):
    with pytest.raises(WorkersError, match="--ray 127.0.0.1:1: .*Start a cluster"):
        OnRay("127.0.0.1:1", workers=1, memory=1, n_jobs=1)
