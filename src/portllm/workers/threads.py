"""Work that threads do side by side while one thread keeps the books."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from threading import Event
from typing import TypeVar

T = TypeVar("T")

Tell = Callable[[int], None]
"""How a job says how far it is."""

MOST_THREADS = 8
"""More than these only wait for the disk, and each needs memory of its own."""


class StoppedError(Exception):
    """Another job failed, or the run was interrupted: what this one does is not wanted any more."""


def default_threads() -> int:
    """One for each processor that this process may use, at most `MOST_THREADS`.

    `OMP_NUM_THREADS` says so where several processes share a machine, as the workers of a fleet do.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = os.environ.get("OMP_NUM_THREADS", "")
    return min(MOST_THREADS, there, max(1, int(share)) if share.isdecimal() else there)


def run_side_by_side(
    jobs: Iterable[Callable[[Tell], T]], *, threads: int, told: Callable[[int], None], done: Callable[[T], None]
) -> None:
    """Run every job on one of some threads; `told` and `done` are called in the thread of the caller.

    Jobs begin in order, and are asked for when there is a thread for them soon. The first one that fails stops all
    others where they next tell something, and its error is raised when they have stopped.

    Args:
        jobs: What to do.
        threads: How many run at a time.
        told: Given each number that a job tells.
        done: Given each result, in the order in which jobs end.
    """
    events: SimpleQueue[int | Future[T]] = SimpleQueue()
    stop = Event()

    def tell(number: int) -> None:
        if stop.is_set():
            raise StoppedError
        events.put(number)

    rest = iter(jobs)
    running = 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                # Some wait in line, so that no thread does while this one is in `done`.
                for job in islice(rest, 3 * threads - running):
                    pool.submit(job, tell).add_done_callback(events.put)
                    running += 1
                if not running:
                    return
                event = events.get()
                if isinstance(event, Future):
                    running -= 1
                    done(event.result())
                else:
                    told(event)
        finally:
            stop.set()
