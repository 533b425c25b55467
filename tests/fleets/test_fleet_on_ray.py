"""A fleet on a Ray cluster that the test starts on this machine."""

import pytest

from portllm.fleets.fleet import fleet, open_pool, plan_fleet, run_fleet
from tests.fleets.conftest import bytes_below

pytestmark = pytest.mark.slow


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
