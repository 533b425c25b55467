"""Look at an installation: versions, extras, devices, loops in C, caches, access to the hub. Asks no server.

Nothing heavy is imported, except to try it: torch says in a small file of its own what it was built for.
"""

import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from portllm import __version__
from portllm.checkpoint.builtin import BUILTIN, locate
from portllm.diagnosing.trial import Trial, try_all
from portllm.errors import NotFoundError
from portllm.files.cache import cache_root
from portllm.installed import EXTRAS, Needed, install, needed
from portllm.native import kernels

DRIVERS = Path("/proc/driver/nvidia/gpus")
"""Where NVIDIA's driver describes its GPUs on Linux, one folder for each."""


@dataclass(frozen=True, slots=True)
class Extra:
    """One extra.

    Attributes:
        name: As in `pip install -e '.[NAME]'`.
        purpose: Which commands need it.
        packages: What it adds.
    """

    name: str
    purpose: str
    packages: tuple[Needed, ...]

    @property
    def is_installed(self) -> bool:
        """Whether all of it is there, in versions that suit."""
        return bool(self.packages) and all(package.suits for package in self.packages)


@dataclass(frozen=True, slots=True)
class Cache:
    """A folder of what can be made or fetched again.

    Attributes:
        name: What it holds.
        folder: Where it is; it need not exist.
        n_bytes: Of all files in it.
        how_to_clear: A command.
    """

    name: str
    folder: Path
    n_bytes: int
    how_to_clear: str


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What `doctor` found.

    Attributes:
        version: Of PortLLM.
        folder: Where it is imported from.
        python: The version of Python.
        system: Operating system and processor.
        cores: Cores that this process may use.
        memory: Bytes of memory of the machine.
        packages: What PortLLM itself needs.
        extras: What each extra adds.
        models: What is missing for each built-in model, by name; empty where nothing is.
        torch_built_for: `cpu`, or the platform of the GPUs that this build of torch can use, with its version.
        gpus: GPUs that a driver knows.
        loops: The loops in C that this processor can run, the one in use last; empty where they were not built.
        caches: What lies on disk.
        hub: The address of the hub.
        is_offline: Whether `HF_HUB_OFFLINE` keeps everything from asking it.
        token: Where a token for the hub comes from, or None.
        trials: What was tried, if it was asked for.
    """

    version: str
    folder: Path
    python: str
    system: str
    cores: int
    memory: int
    packages: tuple[Needed, ...]
    extras: tuple[Extra, ...]
    models: dict[str, str]
    torch_built_for: str
    gpus: tuple[str, ...]
    loops: tuple[str, ...]
    caches: tuple[Cache, ...]
    hub: str
    is_offline: bool
    token: str | None
    trials: tuple[Trial, ...]

    def __repr__(self) -> str:
        return f"DoctorReport({self.version!r}, problems={list(self.problems)})"

    @property
    def problems(self) -> tuple[str, ...]:
        """What keeps PortLLM, or what it found here, from working, each with what to do; empty where all is well."""
        wrong = [package.requirement for package in self.packages if not package.suits]
        found = [f"{', '.join(wrong)}: not installed in a version that suits. {install(wrong)}"] if wrong else []
        if self.gpus and self.torch_built_for == "cpu":
            found.append(f"{self.gpus[0]}: torch was built without CUDA and cannot use it. Install a build for CUDA.")
        return (*found, *(f"{trial.name}: {trial.finding}" for trial in self.trials if not trial.works))


def doctor(*, tried: bool = False) -> DoctorReport:
    """Look at this installation of PortLLM and at the machine.

    Args:
        tried: Also load torch, and transformers and peft where they are installed, and compute on each device.

    Example:
        >>> doctor().version == __version__
        True
    """
    from huggingface_hub import constants, is_offline_mode

    extras = tuple(Extra(name, purpose, needed(name)) for name, purpose in EXTRAS.items())
    live = next(extra for extra in extras if extra.name == "live")
    return DoctorReport(
        version=__version__,
        folder=Path(__file__).parents[1],
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        packages=needed(),
        extras=extras,
        models={name: _missing_of(name) for name in BUILTIN},
        torch_built_for=_built_for(),
        gpus=tuple(_gpus()),
        loops=tuple(kernels.variants()) if kernels else (),
        caches=tuple(_caches(Path(constants.HF_HUB_CACHE))),
        hub=constants.ENDPOINT,
        is_offline=is_offline_mode(),
        token=_token_source(),
        trials=tuple(try_all(live=live.is_installed)) if tried else (),
    )


def _missing_of(name: str) -> str:
    try:
        locate(name)
    except NotFoundError as error:
        return str(error)
    return ""


def _built_for() -> str:
    version = _torch_version()
    platforms = {name: getattr(version, name, None) for name in ("cuda", "hip", "xpu")}
    return next((f"{name} {number}" for name, number in platforms.items() if number), "cpu")


def _torch_version() -> ModuleType | None:
    """The file in which torch says what it was built for; torch itself takes a second to import."""
    spec = find_spec("torch")
    for place in (spec.submodule_search_locations if spec else None) or ():
        inner = spec_from_file_location("torch.version", Path(place) / "version.py")
        if inner and inner.loader and Path(place, "version.py").is_file():
            module = module_from_spec(inner)
            inner.loader.exec_module(module)
            return module
    return None


def _gpus() -> Iterator[str]:
    for file in sorted(DRIVERS.glob("*/information")):
        model = re.search(r"^Model:\s*(\S.*)$", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        yield model[1].strip() if model else "a GPU of NVIDIA"


def _caches(hub: Path) -> Iterator[Cache]:
    own = cache_root()
    for name, folder in (("built-in models", own / "builtin"), ("digests of models", own / "digests")):
        yield Cache(name, folder, _size(folder), f"rm -r '{folder}'")
    yield Cache("models of the hub", hub, _size(hub), "hf cache ls, then hf cache rm NAME")


def _size(folder: Path) -> int:
    """Bytes of all files below a folder, links not followed; what vanishes meanwhile counts nothing."""
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(at, name)).st_size
            except OSError:
                continue
    return total


def _token_source() -> str | None:
    from huggingface_hub import constants, get_token

    if not get_token():
        return None
    variable = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), None)
    return variable or constants.HF_TOKEN_PATH
