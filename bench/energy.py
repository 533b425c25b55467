"""Energy that the machine counts itself: processor packages by RAPL, GPUs by NVML. Both count the whole device.

Many virtual machines show neither, and Linux lets only root read RAPL's counters; then there is no number, and none is
made up. https://docs.kernel.org/power/powercap/powercap.html,
https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"
MICROJOULE, MILLIJOULE = 1e-6, 1e-3


@dataclass(frozen=True)
class Counter:
    """A counter that only rises, until it begins anew.

    Attributes:
        name: Of what it counts.
        read: Its value now.
        unit: Joules of one count.
        span: At which it begins anew; 0 for never.
    """

    name: str
    read: Callable[[], int]
    unit: float
    span: int = 0


class Meter:
    """Adds up what counters count from its beginning to the last reading.

    A counter of a processor begins anew after some minutes of work: it has to be read in the meantime.
    """

    def __init__(self, counters: tuple[Counter, ...] | None = None) -> None:
        self._counters = find_counters() if counters is None else counters
        self._last = [counter.read() for counter in self._counters]
        self._joules = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """What is counted."""
        return tuple(counter.name for counter in self._counters)

    @property
    def joules(self) -> float | None:
        """Counted so far; None where nothing counts."""
        return self._joules if self._counters else None

    def read(self) -> None:
        """Take in what was counted since the last reading."""
        for number, counter in enumerate(self._counters):
            now = counter.read()
            counted = now - self._last[number]
            self._joules += counter.unit * (counted % counter.span if counter.span else counted)
            self._last[number] = now

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self.read()


def find_counters() -> tuple[Counter, ...]:
    """The counters of this machine that can be read."""
    return (*_processors(POWERCAP), *_gpus())


def _processors(folder: Path) -> Iterator[Counter]:
    """Those of processor packages; their parts, which stand below them, are counted with them."""
    for zone in sorted(folder.glob("*-rapl:*")):
        if zone.name.count(":") > 1:
            continue
        with contextlib.suppress(OSError, ValueError):
            span = int((zone / "max_energy_range_uj").read_text())
            name = (zone / "name").read_text().strip()
            read = _reader(zone / "energy_uj")
            read()
            yield Counter(f"{name} (RAPL)", read, MICROJOULE, span)


def _reader(file: Path) -> Callable[[], int]:
    return lambda: int(file.read_text())


def _gpus() -> Iterator[Counter]:
    """Those of GPUs, by the driver's own library."""
    try:
        library = ctypes.CDLL(NVML)
    except OSError:
        return
    count = ctypes.c_uint()
    if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return
    for index in range(count.value):
        device = ctypes.c_void_p()
        counted = ctypes.c_ulonglong()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) or (
            library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(counted))
        ):
            continue
        yield Counter(f"GPU {index} (NVML)", _gpu_reader(library, device), MILLIJOULE)


def _gpu_reader(library: ctypes.CDLL, device: ctypes.c_void_p) -> Callable[[], int]:
    def read() -> int:
        counted = ctypes.c_ulonglong()
        if library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(counted)):
            raise OSError("NVML told a GPU's energy before and does not now")
        return counted.value

    return read
