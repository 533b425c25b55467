"""Giving out the work: what is tried again, how often, and what is not. Outcomes are scripted."""

from collections import deque

import pytest

from portllm.fleets.plan import FleetWork, ModelEntry, PatchEntry, cells_of
from portllm.fleets.run import run_cells
from portllm.workers.pool import Finished, Lost, Pool

MODEL = ModelEntry("v2", "v2", "/v2", "s4k1:v2", 100)
CELLS = cells_of(
    [PatchEntry(name, f"/{name}", name, 1) for name in "abc"], [MODEL], FleetWork(None, ("port",), {}, "s3://o")
)
DONE = {"status": "done", "seconds": 0.1}
REFUSED = {"status": "refused", "reason": "incompatible", "seconds": 0.1}
PASSING = {"status": "failed", "reason": "network", "can_pass": True, "seconds": 0.1}
FAILED = {"status": "failed", "reason": "a bug", "seconds": 0.1}


class Scripted(Pool):
    """A pool whose outcomes are written down: for each cell, what comes of each attempt; None is a worker that dies."""

    def __init__(self, script, *, free=2):
        self.script = {number: deque(results) for number, results in script.items()}
        self.running, self.room = deque(), free

    @property
    def free(self):
        return self.room - len(self.running)

    def submit(self, number, job):
        assert self.free > 0
        self.running.append(number)

    def wait(self):
        number = self.running.popleft()
        result = self.script[number].popleft()
        return Lost(number, "died") if result is None else Finished(number, result)

    def close(self):
        pass


def run(script, *, retries=2, free=2):
    noted = []
    pool = Scripted({number: script.get(number, [DONE]) for number in range(3)}, free=free)
    rows = run_cells(CELLS, pool, retries=retries, note=noted.append)
    assert sorted(noted, key=lambda row: row.folder) == list(rows)
    return rows, pool


class Slow(Scripted):
    """A pool whose workers come up while the first of them is waited for."""

    def wait(self):
        if not self.room:
            self.room = 2
            return None
        return super().wait()


def test_a_pool_that_has_no_worker_yet_is_waited_for():
    pool = Slow({number: [DONE] for number in range(3)}, free=0)
    assert [row.status for row in run_cells(CELLS, pool, retries=0, note=lambda _: None)] == ["done"] * 3


def test_a_cell_that_fails_stops_no_other():
    rows, _ = run({1: [FAILED]})
    assert [row.status for row in rows] == ["done", "failed", "done"]


@pytest.mark.parametrize("first", [None, PASSING])
def test_what_can_pass_is_tried_again_and_the_reason_is_kept(first):
    rows, _ = run({0: [first, DONE]})
    assert rows[0].status == "done"
    assert rows[0].attempts == ("died" if first is None else "network",)


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_tries_are_bounded(retries):
    rows, pool = run({2: [None] * 10}, retries=retries)
    assert rows[2].status == "failed"
    assert rows[2].reason == "died"
    assert 10 - len(pool.script[2]) == retries + 1


@pytest.mark.parametrize("result", [REFUSED, FAILED])
def test_what_cannot_pass_is_tried_once(result):
    rows, pool = run({0: [result, DONE]})
    assert rows[0].reason == result["reason"]
    assert len(pool.script[0]) == 1


def test_rows_are_in_the_order_of_the_cells_whatever_ends_first():
    rows, _ = run({0: [None, None, DONE]}, free=3)
    assert [row.folder for row in rows] == ["v2/a", "v2/b", "v2/c"]
