"""What a study is run on: its numbers hold for this machine, its times for no other."""

import os
import platform
from pathlib import Path

import torch

from portllm.files.kept_results import versions


def describe_machine() -> dict[str, object]:
    """Processor, memory, GPUs and programs, as JSON values; the same for every run on the same machine.

    Example:
        >>> sorted(describe_machine())
        ['cores', 'gpus', 'memory_bytes', 'processor', 'programs', 'python', 'system']
    """
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()} {platform.release()}",
        "python": platform.python_version(),
        "programs": dict(versions()),
    }


def _processor() -> str:
    """Its name, as Linux tells it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
