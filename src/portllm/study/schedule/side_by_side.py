"""Do the steps of a study side by side: each as soon as what it reads is done and a worker is free."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from portllm.errors import OutputError, StudyStepError
from portllm.files.kept_results import Record, identity_or_none, read_record
from portllm.study.definition.plan import Step, startable
from portllm.study.schedule.ledger import Ledger
from portllm.study.schedule.shared import appears
from portllm.workers.pool import Finished, Pool, Retries, work_through

RETRIES = 2
"""Of a step whose worker died, or whose failure may pass."""


def do_side_by_side(ledger: Ledger, pool: Pool, *, note: Callable[[Step, Record, int], None]) -> None:
    """Do what is left of a study.

    A step that fails stops no other that runs: they are brought to their end and noted, and none is begun.

    Args:
        ledger: What is done; each step is noted there when its worker has written its record.
        pool: Who does it: workers as `StepWorker` is one.
        note: Told of each step that is done, its record, and how many workers there are.

    Raises:
        StudyStepError: A step failed, or lost its worker more than `RETRIES` times.
        OutputError: A worker wrote into a folder that cannot be seen from here.
        WorkersError: No worker can be started.
    """
    running: set[int] = set()
    tried = Retries(RETRIES)
    failure: StudyStepError | None = None

    def ready() -> Iterator[tuple[int, dict[str, object]]]:
        if failure is None:
            for step in startable(ledger.left(), tuple(ledger.steps[number] for number in sorted(running))):
                yield ledger.steps.index(step), {"step": step.name, "inputs": ledger.inputs_of(step)}

    for ended in work_through(pool, ready, running):
        step = ledger.steps[ended.number]
        if isinstance(ended, Finished) and "record" in ended.result:
            record = _seen(ledger, step, ended.result["record"])
            ledger.note(step, record)
            note(step, record, len(running) + pool.free)
        elif not tried.again(ended):
            failure = failure or StudyStepError(f"{step.name}: {ended.reason}")
    if failure is not None:
        raise failure


def _seen(ledger: Ledger, step: Step, told: Mapping[str, Any]) -> Record:
    """The record that a worker says it wrote, once it and the output are seen here too.

    Raises:
        OutputError: They do not come to be.
    """
    record, places = Record(**told), ledger.places
    file = places.record_file(step)
    if not appears(
        lambda: read_record(file) == record and identity_or_none(lambda: places.identify(step)) == record.files
    ):
        raise OutputError(
            f"'{file}': a worker wrote it, but it is not visible from here. The study's folder must be on a file "
            "system that all machines share; pass one with --output."
        )
    return record
