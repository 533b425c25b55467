"""Progress on stderr: a bar on a terminal, a line now and then elsewhere, nothing with `--quiet`."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from portllm.cli.render import amount
from portllm.progress import Progress, Unit, silent

LINE_EVERY_SECONDS = 10.0


@contextmanager
def shown_progress(*, quiet: bool = False) -> Iterator[Progress]:
    """A callback that shows progress on stderr while the block runs."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def show(label: str, done: int, total: int, unit: Unit) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total, text="")
            text = f"{amount(done, unit)} of {amount(total, unit)}"
            bars.update(tasks[label], completed=done, total=total, text=text)

        yield show


def _lines() -> Progress:
    """One line for each `LINE_EVERY_SECONDS` of work; short work says nothing."""
    started: dict[str, float] = {}
    spoken: dict[str, float] = {}

    def show(label: str, done: int, total: int, unit: Unit) -> None:
        now = time.monotonic()
        started.setdefault(label, now)
        is_end = done >= total and label in spoken
        if now - spoken.get(label, started[label]) >= LINE_EVERY_SECONDS or is_end:
            spoken[label] = now
            seconds = now - started[label]
            sys.stderr.write(f"{label}: {amount(done, unit)} of {amount(total, unit)}, {seconds:.0f} s\n")
            sys.stderr.flush()
            if is_end:
                del spoken[label]

    return show
