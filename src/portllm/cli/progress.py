"""Progress on stderr: a bar on a terminal, a line now and then elsewhere, nothing with `--quiet`."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from portllm.cli.terminal import say
from portllm.progress import Progress, Unit, silent
from portllm.show.table import done_of

LINE_EVERY_SECONDS = 10.0


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
    """One line for each `LINE_EVERY_SECONDS` of work; short work says nothing."""
    started: dict[str, float] = {}
    spoken: dict[str, float] = {}

    def show(label: str, done: int, total: int, unit: Unit) -> None:
        now, work = time.monotonic(), work_of(label)
        started.setdefault(work, now)
        is_end = done >= total
        if now - spoken.get(work, started[work]) >= LINE_EVERY_SECONDS or (is_end and work in spoken):
            spoken[work] = now
            seconds = now - started[work]
            say(f"{label}: {done_of(done, total, unit)}, {seconds:.0f} s", err=True)
        if is_end:  # the next work of that name begins anew
            del started[work]
            spoken.pop(work, None)

    return show
