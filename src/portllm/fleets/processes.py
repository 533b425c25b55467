"""The workers of one machine: processes that import the program once, and talk in lines of JSON."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from portllm.workers.pool import Finished, Lost, Pool

MEMORY = {"check": 1_000_000_000, "port": 250_000_000, "merge": 1_000_000_000}
"""Bytes that a worker needs for a step, with room to spare."""

LAST_LINES = 3
GRACE_SECONDS = 10.0


def fitting_workers(steps: tuple[str, ...], n_jobs: int) -> int:
    """Workers for this machine: one a core, no more than its free memory holds, no more than there are jobs."""
    in_memory = _free_memory() // max(MEMORY[step] for step in steps)
    return max(1, min(os.cpu_count() or 1, in_memory, n_jobs))


def _free_memory() -> int:
    """Bytes that can be had without swapping; all there are, where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Processes(Pool):
    """A pool of processes of this machine."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._idle: list[_Process] = []
        self._busy = selectors.DefaultSelector()
        self._folder = tempfile.TemporaryDirectory(prefix="portllm-fleet-")

    @property
    def free(self) -> int:
        """How many jobs it takes now."""
        return self._workers - len(self._busy.get_map())

    def submit(self, number: int, job: Mapping[str, Any]) -> None:
        """Give a job to a free worker, which is started if there is none."""
        process = self._idle.pop() if self._idle else self._start()
        process.number = number
        self._busy.register(process.results, selectors.EVENT_READ, process)
        with contextlib.suppress(BrokenPipeError):  # it died while it was idle; its end is read as of any other
            process.jobs.write(json.dumps(job) + "\n")
            process.jobs.flush()

    def wait(self) -> Finished | Lost:
        """The next job to end."""
        key, _ = self._busy.select()[0]
        process: _Process = key.data
        self._busy.unregister(process.results)
        line = process.results.readline()
        if line.endswith("\n"):
            self._idle.append(process)
            return Finished(process.number, json.loads(line))
        return Lost(process.number, process.end())

    def close(self) -> None:
        """End the workers, with time to remove what they have half written."""
        processes = [*(key.data for key in self._busy.get_map().values()), *self._idle]
        for process in processes:
            process.terminate()
        for process in processes:
            process.gone()
        self._busy.close()
        self._folder.cleanup()

    def _start(self) -> "_Process":
        share = max(1, (os.cpu_count() or 1) // self._workers)
        # What a killed worker leaves among its temporary files goes with the pool.
        return _Process({"OMP_NUM_THREADS": str(share), **os.environ, "TMPDIR": self._folder.name})


class _Process:
    """One process, its pipes, and the job that it has."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.number = -1
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed by end and gone)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "portllm.fleets.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the one who gives out the work
        )
        self.jobs = cast("IO[str]", self._process.stdin)
        self.results = cast("IO[str]", self._process.stdout)

    def end(self) -> str:
        """What is known of a process that ended by itself."""
        status = self._process.wait()
        self._said.seek(0)
        said = " / ".join(self._said.read().strip().splitlines()[-LAST_LINES:])
        self._close()
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"its worker died: {how}" + (f": {said}" if said else "")

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def gone(self) -> None:
        """Wait for its end, which gives it time to remove what it has half written."""
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        for stream in (self.jobs, self.results, self._said):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
