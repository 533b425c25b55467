"""The program `portllm`: its commands, and how an error ends it.

Modules that cost time to import are imported inside the commands that need them, so that `portllm --help` answers at
once. Exit status: 0 done; 1 refused or failed; 2 wrong usage; 3 done, and the verdict is no.
"""

import atexit
import errno
import gc
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, NoReturn

import typer

from portllm import __version__
from portllm.cli.commands import Commands
from portllm.cli.terminal import let_go, say
from portllm.errors import PortLLMError

RESUMED = {
    "demo": "the same command resumes after the last finished step",
    "fleet": "the same command runs what is missing",
    "study": "the same command resumes after the last finished step",
    "merge": "the same command resumes at the current shard",
    "port": "the same command resumes at the current layer",
}
"""What becomes of what an interrupted command has done; the others begin anew."""

app = typer.Typer(
    name="portllm",
    cls=Commands,
    help="Carry a fine-tuned model's patch over to the next version of its base, without training.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

_OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EPIPE, errno.EIO)

MAX_SHOWN = 250
"""Characters of a name that is too long for any file."""

INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@app.callback(invoke_without_command=True)
def program(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    """Carry a fine-tuned model's patch over to the next version of its base, without training."""
    if version:
        say(f"portllm {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the program; an error of ours is a message and exit status 1, a bug keeps its traceback."""
    # Waiting threads of torch spin for long by default, and take a busy machine's cores from those that work; without
    # any spinning, short operations wait for threads to wake. Read when torch is loaded; what the user has set stays.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # numpy's products are thin here: threads would cost more than they bring. Torch has threads of its own.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # What is imported lives as long as the program: to look for garbage in it, while torch is imported and again at the
    # end, takes a third as long as that import.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except PortLLMError as error:
        # Further lines are indented: none that a file had a hand in looks like one of the program's own.
        say(f"portllm: {error}".replace("\n", "\n  "), err=True)
        sys.exit(1)
    except OSError as error:
        # What the system refuses about a file that it names, or for want of room, is no bug.
        if error.filename is None and error.errno not in _OUT_OF_ROOM:
            raise
        place = "" if error.filename is None else f"'{_short(str(error.filename))}': "
        say(f"portllm: {place}{error.strerror}.", err=True)
        if error.filename is None and sys.stdout is not None:
            let_go(sys.stdout)
        sys.exit(1)
    except SystemExit as end:
        if end.code in INTERRUPTED:
            say(f"portllm: interrupted; no partial output was left, and {after_interruption(sys.argv[1:])}.", err=True)
        raise


def _short(name: str) -> str:
    return name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}..."


def after_interruption(arguments: Sequence[str]) -> str:
    """What the same command does when it is given again.

    Example:
        >>> after_interruption(["merge", "patch"]), after_interruption(["combine", "merge", "other"])
        ('the same command resumes at the current shard', 'the same command starts over')
    """
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    return RESUMED.get(command, "the same command starts over")


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """End as after Ctrl-C, so that what is half done is cleaned up."""
    del frame
    sys.exit(128 + number)
