"""mergekit in an environment of its own: it is LGPL, and never imported by us."""

import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).with_name("mergekit.txt")


def install_mergekit(work: Path) -> Path:
    """The folder of its programs below `work`; installed by pip where it is not, at the pinned versions."""
    environment = work / "mergekit-venv"
    done = environment / ".installed"
    if not done.exists() or done.read_text() != PINS.read_text():
        print("installing mergekit (a large download, once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        pip = (environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
        subprocess.run([*pip, "-r", PINS], check=True)
        done.write_text(PINS.read_text())
    return environment / "bin"


def mergekit_version() -> str:
    """The version that is installed."""
    return next(line.split("==")[1] for line in PINS.read_text().splitlines() if line.startswith("mergekit=="))
