"""Run a command in its own process and measure it: wall time, peak memory, resident and private.

Resident memory (VmHWM, the kernel's high-water mark) counts pages of mapped files too, which the kernel can take back;
private memory (RssAnon, sampled) is what the process truly needs. Linux only.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Run:
    """One run of a command.

    Attributes:
        seconds: Wall time, interpreter and imports included.
        resident_bytes: Peak resident memory.
        private_bytes: Peak private memory, sampled.
    """

    seconds: float
    resident_bytes: int
    private_bytes: int


def measure(command: Sequence[str]) -> Run:
    """Run a command to its end; a failing one ends the benchmark with what it said."""
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        resident = private = 0
        while process.poll() is None:
            now = _memory(process.pid)
            if (
                now.get("VmHWM", resident) < resident
            ):  # until it becomes the command, the child is a copy of this process
                private = 0
            resident = now.get("VmHWM", resident)
            private = max(private, now.get("RssAnon", 0))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - began
        if process.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command)}: exit status {process.returncode}\n{output.read()}")
    return Run(seconds, resident, private)


def summarize(runs: Sequence[Run]) -> dict[str, object]:
    """Medians and ranges of several runs of the same command, with the runs themselves."""
    columns = {name: [getattr(run, name) for run in runs] for name in ("seconds", "resident_bytes", "private_bytes")}
    return {
        "runs": [asdict(run) for run in runs],
        "median": {name: statistics.median(values) for name, values in columns.items()},
        "range": {name: [min(values), max(values)] for name, values in columns.items()},
    }


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    models = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def _memory(pid: int) -> dict[str, int]:
    """`VmHWM`, the peak of resident memory so far, and `RssAnon`, private memory now, in bytes; empty at the end."""
    lines = (line.split() for line in _lines(f"/proc/{pid}/status"))
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line and line[0] in ("VmHWM:", "RssAnon:")}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # the process has ended
        return []
