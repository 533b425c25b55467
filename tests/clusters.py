"""Ray clusters that a test starts on this machine: import the fixtures that it asks for."""

import os
from pathlib import Path

import pytest

import portllm


@pytest.fixture
def environment(monkeypatch):
    """Workers find this program, and Ray tells nobody of it."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(portllm.__file__).parents[1]), prepend=os.pathsep)


@pytest.fixture
def cluster(environment):
    """Two nodes with one core each, as two machines would be; ends with the test."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    started.add_node(num_cpus=1)
    yield started
    started.shutdown()


def spring_once(place, condition):
    """The text of a `sitecustomize.py`: the first worker process to open a file of which `condition` holds is killed.

    Args:
        place: A folder; what lies in it says that the trap has sprung.
        condition: A Python expression of `name`, the file's.
    """
    return (
        "import os, signal, sys\n"
        f"sprung = {str(place / 'sprung')!r}\n"
        "def watch(event, arguments):\n"
        "    name = str(arguments[0]) if event == 'open' else ''\n"
        f"    if name and {condition} and not os.path.exists(sprung):\n"
        "        os.close(os.open(sprung, os.O_CREAT | os.O_WRONLY))\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "if 'worker' in ' '.join(sys.orig_argv):\n"
        "    sys.addaudithook(watch)\n"
    )
