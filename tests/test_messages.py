"""What the terminal is spared while other packages are loaded, and what it is not."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import portllm
from portllm.messages import errors_only


class Kept(logging.Handler):
    """Keeps what is said."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def test_errors_are_shown_and_warnings_are_not_inside_the_block_alone():
    inner, kept = logging.getLogger("some_package.inner"), Kept()
    inner.addHandler(kept)
    with errors_only("some_package"):
        inner.warning("inside")
        inner.error("wrong")
    inner.warning("after")
    assert kept.messages == ["wrong", "after"]


@pytest.mark.slow
def test_of_what_bitsandbytes_says_when_peft_loads_it_only_errors_reach_the_terminal(tmp_path):
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text(
        "import logging, types\n"
        "nn = types.SimpleNamespace()\n"
        "logging.getLogger('bitsandbytes.backends').warning('no fast kernel')\n"
        "logging.getLogger('bitsandbytes.backends').error('broken library')\n"
    )
    paths = os.pathsep.join(map(str, (tmp_path, Path(portllm.__file__).parents[1])))
    command = [sys.executable, "-c", "import portllm.running.model, sys; assert 'bitsandbytes' in sys.modules"]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == "broken library\n"
