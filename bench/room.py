"""Whether there is memory for a job, asked before it begins rather than found out by the kernel."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.contests import Job


def fitting(jobs: Sequence[Job]) -> tuple[tuple[Job, ...], tuple[str, ...]]:
    """The jobs that the memory free now has room for, and a line for each other one."""
    fit, lines = [], []
    for job in jobs:
        device, needed = job.memory
        free = free_memory(device) if needed else needed
        if free >= needed:
            fit.append(job)
        else:
            where = "memory" if device == "cpu" else "GPU memory"
            lines.append(f"{job.label}: needs about {needed / 1e9:.1f} GB of {where}, {free / 1e9:.1f} GB were free")
    return tuple(fit), tuple(lines)


def free_memory(device: str) -> int:
    """Bytes that can be had on `cpu` without swapping, or on the first CUDA device."""
    if device == "cpu":
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    # In a process of its own: whoever asks takes some of the memory as long as it lives.
    ask = (sys.executable, "-c", "import torch; print(torch.cuda.mem_get_info()[0])")
    return int(subprocess.run(ask, check=True, capture_output=True, text=True).stdout)
