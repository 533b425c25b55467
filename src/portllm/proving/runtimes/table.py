"""The table of runtimes, and the Python under which one runs."""

import functools
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from portllm.errors import NotFoundError
from portllm.files.cache import cache_root
from portllm.proving.runtimes.contract import BaseForm, Runtime
from portllm.proving.runtimes.program import started_program
from portllm.proving.runtimes.vllm import started_vllm


def _program(
    name: str, title: str, package: str, install: str, *, profile: str | None = None, base: BaseForm = "folder"
) -> Runtime:
    """A runtime that the program of its name talks to; see `programs`."""
    start = functools.partial(started_program, name)
    return Runtime(
        name=name, title=title, package=package, install=install, profile=profile or name, base=base, start=start
    )


RUNTIMES: Mapping[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        _program("mistralrs", "mistral.rs", "mistralrs", "mistralrs==0.9.5"),
        _program("llamacpp", "llama.cpp", "xllamacpp", "xllamacpp==2026.10.11549", base="gguf"),
        _program("mlx", "MLX-LM", "mlx_lm", "'mlx[cpu]==0.32.4' mlx-lm==0.32.2"),
        Runtime(name="vllm", title="vLLM", package="vllm", install="vllm", profile="vllm", start=started_vllm),
        _program("transformers", "transformers", "peft", "torch transformers peft", profile="peft"),
    )
}


def runtime_named(name: str) -> Runtime:
    """A row by its name.

    Raises:
        NotFoundError: There is none.
    """
    if name not in RUNTIMES:
        raise NotFoundError(
            f"--runtime {name}: is not started by this program; it starts {', '.join(RUNTIMES)}. Of a server that runs "
            "already, pass the address, such as http://localhost:8000/v1."
        )
    return RUNTIMES[name]


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
    commands = [f"python3 -m venv {environment}", f"{environment}/bin/pip install {runtime.install}"]
    raise NotFoundError(
        f"{runtime.name}: {runtime.title} is not installed. Name the Python of an environment that has it with "
        f"--python, or install it into one of its own, which is then found (in PortLLM's folder, "
        f"'make runtime-{runtime.name}' does so):\n" + "\n".join(commands)
    )
