"""Progress on stderr: a bar on a terminal, a few lines elsewhere, nothing with `--quiet`."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from portllm.cli.terminal import say
from portllm.progress import Progress, Unit, silent
from portllm.show.table import done_of

FIRST_LINE_SECONDS = 10.0
"""Work that takes no longer says nothing where there is no terminal."""


@contextmanager
def shown_progress(*, quiet: bool = False) -> Iterator[Progress]:
    """A callback that shows progress on stderr while the block runs."""
    if quiet:
        yield silent
    elif sys.stderr is not None and sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        yield _lines()


def work_of(label: str) -> str:
    """The work that a label names, without the part of it that is being done.

    Example:
        >>> work_of("evaluate: evolved + ported")
        'evaluate'
    """
    return label.split(":", 1)[0]


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<36}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def show(label: str, done: int, total: int, unit: Unit) -> None:
            work = work_of(label)
            if work not in tasks:
                tasks[work] = bars.add_task(label, total=total, text="")
            text = done_of(done, total, unit)
            if bars.tasks[tasks[work]].finished and done < total:  # the next work of that name begins anew
                bars.reset(tasks[work], total=total)
            bars.update(tasks[work], description=label, completed=done, total=total, text=text)

        yield show


def _lines() -> Progress:
    """A line after `FIRST_LINE_SECONDS` of work with what is left, again after each doubling, and one at its end."""
    started: dict[str, float] = {}
    spoken: dict[str, float] = {}

    def show(label: str, done: int, total: int, unit: Unit) -> None:
        now, work = time.monotonic(), work_of(label)
        seconds = now - started.setdefault(work, now)
        is_end = done >= total
        if seconds >= max(FIRST_LINE_SECONDS, 2 * spoken.get(work, 0.0)) or (is_end and work in spoken):
            spoken[work] = seconds
            left = f", about {seconds * (total - done) / done:.0f} s left" if 0 < done < total else ""
            say(f"{label}: {done_of(done, total, unit)}, {seconds:.0f} s{left}", err=True)
        if is_end:  # the next work of that name begins anew
            del started[work]
            spoken.pop(work, None)

    return show
