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
from portllm.proving.runtimes.vllm import started_vllm

RUNTIMES: Mapping[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            name="mistralrs",
            title="mistral.rs",
            package="mistralrs",
            install=("mistralrs==0.9.5",),
            profile="mistralrs",
            start=functools.partial(started_program, "mistralrs"),
        ),
        Runtime(
            name="llamacpp",
            title="llama.cpp",
            package="xllamacpp",
            install=("xllamacpp==2026.10.11549",),
            profile="llamacpp",
            base="gguf",
            start=functools.partial(started_program, "llamacpp"),
        ),
        Runtime(
            name="mlx",
            title="MLX-LM",
            package="mlx_lm",
            install=("'mlx[cpu]==0.32.4' mlx-lm==0.32.2",),
            profile="mlx",
            start=functools.partial(started_program, "mlx"),
        ),
        Runtime(
            name="vllm",
            title="vLLM",
            package="vllm",
            install=("vllm",),
            profile="vllm",
            start=started_vllm,
        ),
        Runtime(
            name="transformers",
            title="transformers",
            package="peft",
            install=("torch transformers peft",),
            profile="peft",
            start=functools.partial(started_program, "transformers"),
        ),
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
    commands = [f"python3 -m venv {environment}"]
    commands += [f"{environment}/bin/pip install {what}" for what in runtime.install]
    raise NotFoundError(
        f"{runtime.name}: {runtime.title} is not installed. Name the Python of an environment that has it with "
        f"--python, or install it into one of its own, which is then found (in PortLLM's folder, "
        f"'make runtime-{runtime.name}' does so):\n" + "\n".join(commands)
    )
