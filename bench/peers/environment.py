"""Programs of others in environments of their own: none of them is imported by us."""

import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent


def install(name: str, work: Path) -> Path:
    """The folder of a peer's programs below `work`; installed by pip where it is not, as `NAME.txt` pins it.

    A file of pins that names torch is a whole environment. Any other one is what a peer needs beside our packages,
    which it then sees: torch is shared, and measured in one version.
    """
    environment, pins = work / f"{name}-venv", HERE / f"{name}.txt"
    done = environment / ".installed"
    if not done.exists() or done.read_text() != pins.read_text():
        print(f"installing {name} (once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        pip = (environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
        subprocess.run([*pip, "--no-deps", "-r", pins], check=True)
        if version("torch", pins) is None:
            (packages,) = environment.glob("lib/*/site-packages")
            (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        done.write_text(pins.read_text())
    return environment / "bin"


def peer_version(name: str) -> str:
    """The version of a peer that is installed."""
    found = version(name, HERE / f"{name}.txt")
    if found is None:
        raise ValueError(f"'{name}.txt' does not pin {name}")
    return found


def version(package: str, pins: Path) -> str | None:
    """What a file pins a package at; None where it does not name it."""
    lines = (line.split("==") for line in pins.read_text().splitlines())
    return next((line[1] for line in lines if line[0] == package), None)
