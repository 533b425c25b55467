"""The table of runtimes, and the Python under which one runs."""

import functools
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from portllm.errors import NotFoundError
from portllm.files.cache import cache_root
from portllm.proving.runtimes.contract import Runtime
from portllm.proving.runtimes.program import started_program

RUNTIMES: Mapping[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            name="mistralrs",
            title="mistral.rs",
            package="mistralrs",
            install=("mistralrs",),
            start=functools.partial(started_program, "mistralrs"),
        ),
    )
}


def environment_of(runtime: Runtime) -> Path:
    """The folder of the environment in which a runtime is looked for, where this Python does not have it."""
    return cache_root() / "runtimes" / runtime.name


def python_of(runtime: Runtime, given: Path | None = None) -> Path:
    """The Python that a runtime runs under: the one given, this one, or that of the runtime's own environment.

    Raises:
        NotFoundError: None of them is there.
    """
    if given is not None:
        if not given.is_file():
            raise NotFoundError(f"'{given}': is no file; expected the Python that {runtime.title} is installed under.")
        return given
    if find_spec(runtime.package) is not None:
        return Path(sys.executable)
    environment = environment_of(runtime)
    python = environment / "bin" / "python"
    if python.is_file():
        return python
    commands = [f"python3 -m venv {environment}"]
    commands += [f"{environment}/bin/pip install {what}" for what in runtime.install]
    raise NotFoundError(
        f"{runtime.name}: {runtime.title} is not installed. Name the Python of an environment that has it with "
        f"--python, or install it into one of its own, which is then found:\n" + "\n".join(commands)
    )
