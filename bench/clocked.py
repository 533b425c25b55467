"""A command of ours whose progress is told to a clock: `python clocked.py REPORT COMMAND...`.

Writes each event with the seconds since the program began, of the processor and of the wall. The command is run as the
program runs it, in this process.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import portllm.cli.progress
from portllm.cli.main import main
from portllm.progress import Progress

began = time.perf_counter()
report = Path(sys.argv.pop(1))
events: list[tuple[object, ...]] = []


@contextmanager
def clocked(*, quiet: bool = False) -> Iterator[Progress]:  # noqa: ARG001
    """Stands in for what shows progress."""
    yield lambda *event: events.append((*event, time.process_time(), time.perf_counter() - began))


portllm.cli.progress.shown_progress = clocked
try:
    main()
finally:
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(events) + "\n")
