"""So many workers, each with one job at a time, any of which may die."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any


@dataclass(frozen=True, slots=True)
class Finished:
    """A job came back.

    Attributes:
        number: The job's.
        result: What became of it, as the worker says it.
    """

    number: int
    result: Mapping[str, Any]

    @property
    def reason(self) -> str:
        """Why the job is not done, where it is not."""
        return str(self.result["reason"])


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker of a job is gone, and with it what became of the job.

    Attributes:
        number: The job's.
        reason: What is known of the worker's end.
    """

    number: int
    reason: str


class Retries:
    """Which jobs are tried again: those whose worker died and those whose failure may pass, so often and no more."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._reasons: dict[int, list[str]] = defaultdict(list)

    def again(self, ended: Finished | Lost) -> bool:
        """Whether a job that ended is to be tried once more, which is counted."""
        may_pass = isinstance(ended, Lost) or ended.result.get("can_pass", False)
        if not may_pass or len(self.reasons(ended.number)) >= self._most:
            return False
        self._reasons[ended.number].append(ended.reason)
        return True

    def reasons(self, number: int) -> tuple[str, ...]:
        """Why a job was tried again."""
        return tuple(self._reasons[number])


class Pool(ABC):
    """Workers. What they are is another module's job: `on_ray` has those of Ray, a fleet has processes of its own."""

    @property
    @abstractmethod
    def free(self) -> int:
        """How many jobs it takes now."""

    @abstractmethod
    def submit(self, number: int, job: Mapping[str, Any]) -> None:
        """Give a job to a free worker."""

    @abstractmethod
    def wait(self) -> Finished | Lost | None:
        """The next job to end; None where a worker became free in the meantime."""

    @abstractmethod
    def close(self) -> None:
        """End the workers, whatever they are doing."""

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def work_through(
    pool: Pool, ready: Callable[[], Iterator[tuple[int, Mapping[str, Any]]]], running: set[int]
) -> Iterator[Finished | Lost]:
    """Jobs as they end, until none runs and none is ready.

    Args:
        pool: Who does them.
        ready: What can begin now, with its number, as long as it neither runs nor has ended.
        running: Kept up: the numbers of the jobs that run.
    """
    while True:
        for number, job in islice(ready(), pool.free):
            running.add(number)
            pool.submit(number, job)
        if not running and next(ready(), None) is None:
            return
        ended = pool.wait()
        if ended is not None:
            running.discard(ended.number)
            yield ended
