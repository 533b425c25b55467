"""So many workers, each with one job at a time, any of which may die."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker of a job is gone, and with it what became of the job.

    Attributes:
        number: The job's.
        reason: What is known of the worker's end.
    """

    number: int
    reason: str


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
