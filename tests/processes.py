"""Work in a process of its own, which may die: forked, so that it costs milliseconds, and killed where a test says."""

import os
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path

import pytest

from portllm.errors import OutputError

HANGS_AFTER = 300
"""Seconds after which an alarm ends a child, so that one that hangs fails its test."""


def in_child(work):
    """Runs `work` in a forked process; its exit status, or minus the signal that ended it."""
    while not others_sleep():
        os.sched_yield()
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(HANGS_AFTER)
        try:
            work()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def others_sleep():
    """Whether no other thread of this process runs.

    A thread that was joined still tidies up for a moment. If it does so in MKL when the process is forked, the child
    waits for ever for the lock that it held there.
    """
    others = [task for task in Path("/proc/self/task").glob("*") if task.name != str(threading.get_native_id())]
    return all(state_of(task) == "S" for task in others)


def state_of(task):
    """The letter for what a thread does; that of one that sleeps where it has just ended."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "S"


def die():
    """What power loss and the kernel do: no handler runs, nothing is closed in order."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(seconds, work):
    """Runs `work` in a forked process that is killed after so many seconds, wherever it is; whether it was."""

    def run():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # as SIGKILL: no handler runs
        signal.setitimer(signal.ITIMER_REAL, seconds)
        work()
        signal.setitimer(signal.ITIMER_REAL, 0)

    status = in_child(run)
    assert status in (0, -signal.SIGALRM)
    return status != 0


def die_at_event(number, *, below):
    """Die just before the `number`-th time that this process opens, renames, removes or makes something `below`.

    What has no whole path counts too: it is relative to a folder that is open.

    There is no way back: for children only.
    """
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        touches = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "ctypes.dlsym")
        place = str(arguments[0])
        if touches and (event == "ctypes.dlsym" or str(below) in place or not os.path.isabs(place)):
            if seen == number:
                die()
            seen += 1

    sys.addaudithook(watch)


def limited(n_bytes, work):
    """In a child that can write no file beyond so many bytes, as on a disk that is full; 0 if it is told rightly."""

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
        with pytest.raises(OutputError, match="(cannot write into|could not be written).*File too large"):
            work()

    return in_child(run)
