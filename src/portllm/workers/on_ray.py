"""The workers of a Ray cluster: actors, each with one job at a time. Needs the extra `ray`."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from portllm import __version__
from portllm.errors import MissingExtraError, WorkersError
from portllm.installed import why_not
from portllm.workers.pool import Finished, Lost, Pool

if TYPE_CHECKING:
    from ray import ObjectRef

START_SECONDS = 300.0
"""How long the first worker may take: a cluster that grows on demand has to start a machine."""

KNOCK_SECONDS = 10.0

MOST_FAILED_STARTS = 5
"""A machine may go while a worker starts on it; one that lacks this program fails every time."""


class Worker(Protocol):
    """Does one job after another; of a job that fails it says so, and raises nothing."""

    def do(self, job: Mapping[str, Any]) -> Mapping[str, Any]:
        """What became of a job."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine of a cluster has to give.

    Attributes:
        cores: Of its processors.
        gpus: As many as Ray may use.
    """

    cores: int
    gpus: int


@dataclass(frozen=True, slots=True)
class ClusterRequest:
    """What is asked of a cluster.

    Attributes:
        workers: How many.
        cores: Of each.
        gpus: Of each; with none, it sees none.
        memory: Bytes that Ray sets aside for each; 0 where it need not.
    """

    workers: int
    cores: int = 1
    gpus: int = 0
    memory: int = 0


class RayWorker:
    """What becomes an actor: a worker that first says what program it runs."""

    def __init__(self, make: Callable[[], Worker], folder: str) -> None:
        with contextlib.suppress(OSError):  # a machine that has no such folder is given absolute names
            os.chdir(folder)
        self._worker = make()

    def version(self) -> str:
        """The version of this program where the actor is."""
        return __version__

    def do(self, job: Mapping[str, Any]) -> Mapping[str, Any]:
        """What became of a job."""
        return self._worker.do(job)


class OnRay(Pool):
    """A pool of Ray actors."""

    def __init__(
        self,
        address: str,
        make: Callable[[], Worker],
        share: Callable[[Sequence[Machine]], ClusterRequest],
        *,
        own_cores: int | None = None,
    ) -> None:
        """Connect, and ask for the actors.

        Args:
            address: As `ray.init` takes it: `auto`, `local` for a cluster of this machine's own, `host:port`,
                `ray://host:port`.
            make: Makes a worker, where the actor is; relative names mean there what they mean here.
            share: What to ask of machines like those that the cluster has.
            own_cores: What a cluster of this machine's own takes for its number of cores; None for those that it has.

        Raises:
            MissingExtraError: Ray is not installed.
            WorkersError: There is no cluster at the address, or its machines cannot give what is asked for.
        """
        self._ray = _load()
        self._began = not self._ray.is_initialized()
        if self._began:
            _connect(self._ray, address, own_cores)
        try:
            asked = share(_machines(self._ray))
        except WorkersError:
            self._end()
            raise
        reserved = {"memory": asked.memory} if asked.memory else {}
        options = {"num_cpus": asked.cores, "num_gpus": asked.gpus, **reserved}
        self._actor = self._ray.remote(RayWorker).options(**options)
        self._arguments = (make, os.getcwd())
        self._failed_starts = 0
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[int, Any]] = {}
        for _ in range(asked.workers):
            self._start()

    @property
    def free(self) -> int:
        """How many jobs it takes now."""
        return len(self._idle)

    def submit(self, number: int, job: Mapping[str, Any]) -> None:
        """Give a job to a free worker."""
        actor = self._idle.pop()
        self._busy[actor.do.remote(dict(job))] = (number, actor)

    def wait(self) -> Finished | Lost | None:
        """The next job to end; None where a worker became free in the meantime."""
        waiting_for = [*self._busy, *self._starting]
        ready, _ = self._ray.wait(waiting_for, num_returns=1, timeout=None if self._busy else START_SECONDS)
        if not ready:
            raise WorkersError(
                f"Ray started no worker in {START_SECONDS:.0f} seconds: it has no core, GPU or memory left, or "
                "takes longer to load this program. Check 'ray status', or run without --ray."
            )
        reference = ready[0]
        if reference in self._starting:
            self._welcome(reference)
            return None
        number, actor = self._busy.pop(reference)
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)
            self._start()
            return Lost(number, f"its worker died: {_reason(error)}")
        self._idle.append(actor)
        return Finished(number, result)

    def close(self) -> None:
        """End the actors, and the cluster too where it was started for them."""
        for actor in (*self._starting.values(), *self._idle, *(actor for _, actor in self._busy.values())):
            self._ray.kill(actor)
        self._end()

    def _end(self) -> None:
        if self._began:
            self._ray.shutdown()

    def _start(self) -> None:
        actor = self._actor.remote(*self._arguments)
        self._starting[actor.version.remote()] = actor

    def _welcome(self, reference: "ObjectRef[str]") -> None:
        actor = self._starting.pop(reference)
        try:
            version = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts > MOST_FAILED_STARTS:
                raise WorkersError(
                    f"a worker could not start: {_reason(error)}. Every machine of the cluster needs PortLLM "
                    f"{__version__}."
                ) from error
            self._start()
            return
        if version != __version__:
            raise WorkersError(
                f"a machine of the cluster has PortLLM {version}, this one has {__version__}. Install the same "
                "version everywhere."
            )
        self._idle.append(actor)


def _machines(ray: ModuleType) -> tuple[Machine, ...]:
    """Those of the cluster that are there and have a core."""
    given = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    machines = (Machine(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in given)
    return tuple(machine for machine in machines if machine.cores)


def _connect(ray: ModuleType, address: str, own_cores: int | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = {"num_cpus": own_cores, "include_dashboard": False} if address == "local" else {}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise WorkersError(
            f"--ray {address}: {_reason(error)}. Start a cluster with 'ray start --head', or pass 'local'."
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own there


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at `host:port`; Ray itself would ask again for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()


def _reason(error: Exception) -> str:
    text = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return text[0].rstrip(".") if text else type(error).__name__


def _load() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(f"--ray needs Ray; {why_not(error, 'ray')}") from error
    module: ModuleType = ray
    return module
