"""Work in a process of its own, which may die: forked, so that it costs milliseconds, and killed where a test says."""

import os
import resource
import signal
import sys
import traceback

import pytest

from portllm.errors import OutputError


def in_child(work):
    """Runs `work` in a forked process; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
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


def die():
    """What power loss and the kernel do: no handler runs, nothing is closed in order."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_event(number, *, below):
    """Die just before the `number`-th time that this process opens, renames, removes or makes something `below`.

    There is no way back: for children only.
    """
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        touches = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "ctypes.dlsym")
        if touches and (event == "ctypes.dlsym" or str(below) in str(arguments[0])):
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
