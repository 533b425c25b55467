"""Run a command in its own process and measure it from outside: time, memory, bytes from and to the disk, energy.

Resident memory (VmHWM, the kernel's high-water mark) counts pages of mapped files too, which the kernel can take back;
private memory (RssAnon and RssShmem, sampled) is what the process truly needs. Children count with their parent, and
what they share counts once. Linux only.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench.energy import Meter

SAMPLE_SECONDS = 0.005
SAMPLES_BETWEEN_CHILDREN = 20
"""Who the children are is looked up less often than memory: it takes longer."""

MEMORY = ("VmHWM:", "RssAnon:", "RssShmem:")


@dataclass(frozen=True)
class Run:
    """One run of a command.

    Attributes:
        seconds: Wall time, interpreter and imports included.
        cpu_seconds: Time on all cores, in the program and in the kernel for it.
        resident_bytes: Peak resident memory.
        private_bytes: Peak private memory, sampled.
        disk_read_bytes: Fetched from the disk; what the page cache held does not count.
        disk_written_bytes: Handed to the disk, at once or later.
        joules: What the machine took in the meantime, as far as its meters tell; None where it has none.
    """

    seconds: float
    cpu_seconds: float
    resident_bytes: int
    private_bytes: int
    disk_read_bytes: int
    disk_written_bytes: int
    joules: float | None = None


def measure(command: Sequence[str], *, env: Mapping[str, str] | None = None, good: Sequence[int] = (0,)) -> Run:
    """Run a command to its end; one whose exit status is not `good` ends the benchmark with what it said."""
    with tempfile.TemporaryFile("w+") as output, Meter() as meter:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**_environment(), **(env or {})},
        )
        try:
            resident, private = _watch(process.pid, meter.read)
        except BaseException:  # whoever stops the benchmark stops what it measures
            process.terminate()
            process.wait()
            raise
        seconds = time.perf_counter() - began
        disk = _counters(process.pid)  # readable until the process is waited for
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in good:
            output.seek(0)
            sys.exit(f"{' '.join(command)}: exit status {process.returncode}\n{output.read()}")
    return Run(
        seconds=seconds,
        cpu_seconds=used.ru_utime + used.ru_stime,
        resident_bytes=resident,
        private_bytes=private,
        disk_read_bytes=disk.get("read_bytes", 0),
        disk_written_bytes=disk.get("write_bytes", 0),
        joules=meter.joules,
    )


def summarize(runs: Sequence[Run]) -> dict[str, object]:
    """Medians and ranges of several runs of the same command, with the runs themselves; of what was told of all."""
    columns = {field.name: [getattr(run, field.name) for run in runs] for field in fields(Run)}
    columns = {name: values for name, values in columns.items() if None not in values}
    return {
        "runs": [asdict(run) for run in runs],
        "median": {name: statistics.median(values) for name, values in columns.items()},
        "range": {name: [min(values), max(values)] for name, values in columns.items()},
    }


def machine(folder: Path) -> dict[str, object]:
    """What the numbers were measured on, with the disk that holds `folder`."""
    models = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "disk": _disk(folder),
        "system": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "meters": list(Meter().names),
    }


def _environment() -> dict[str, str]:
    """That of a user, whose Python keeps what it compiled; else each run would compile the program anew."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _watch(pid: int, now_and_then: Callable[[], None]) -> tuple[int, int]:
    """Peaks of resident and private memory of a process and its children, until it ends; it is not waited for."""
    resident = private = 0
    for family in _families(pid, now_and_then):
        now = [_memory(member) for member in family]
        peak = sum(memory.get("VmHWM", 0) for memory in now)
        resident = max(resident, peak)
        own = sum(memory.get("RssAnon", 0) for memory in now)
        shared = max(memory.get("RssShmem", 0) for memory in now)
        private = max(private, own + shared)
    return resident, private


def _families(pid: int, now_and_then: Callable[[], None]) -> Iterator[list[int]]:
    """A process and all below it, again and again until it ends."""
    family = [pid]
    n_samples = 0
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if n_samples % SAMPLES_BETWEEN_CHILDREN == 0:
            family = _with_children(pid)
            now_and_then()
        n_samples += 1
        yield family
        time.sleep(SAMPLE_SECONDS)


def _with_children(pid: int) -> list[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:  # it has ended
        return [pid]
    children = [
        int(word)
        for thread in threads
        for line in _lines(f"/proc/{pid}/task/{thread}/children")
        for word in line.split()
    ]
    return [pid, *(member for child in children for member in _with_children(child))]


def _memory(pid: int) -> dict[str, int]:
    """`VmHWM`, the peak of resident memory so far, and the parts of private memory now, in bytes; empty at the end."""
    lines = (line.split() for line in _lines(f"/proc/{pid}/status"))
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line and line[0] in MEMORY}


def _counters(pid: int) -> dict[str, int]:
    """Bytes of a process that went through the disk, its children's included once it has waited for them."""
    return {line.split(": ")[0]: int(line.split(": ")[1]) for line in _lines(f"/proc/{pid}/io")}


def _disk(folder: Path) -> str:
    """The file system that holds a folder, and the device below it: virtual, or as it told the kernel."""
    mounts = [line.split() for line in _lines("/proc/mounts")]
    above = {str(parent) for parent in (folder.resolve(), *folder.resolve().parents)}
    device, _, kind = max((m[:3] for m in mounts if m[1] in above), key=lambda m: len(m[1]), default=["?", "", "?"])
    name = Path(device).name
    whole = name.rstrip("0123456789")  # of vda1, vda
    turns = _lines(f"/sys/block/{name}/queue/rotational") or _lines(f"/sys/block/{whole}/queue/rotational")
    known = {"0": "solid", "1": "turning"}.get(turns[0] if turns else "", "unknown")
    return f"{kind} on {name} ({'virtual' if name.startswith('vd') else known})"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # the process has ended
        return []
