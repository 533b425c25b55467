"""A worker of a study: does one step after another for a run that is another process, and writes their records."""

import socket
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from portllm.errors import DataError, OutputBusyError, PortLLMError, RemoteError, WorkersError
from portllm.files.kept_results import do, versions
from portllm.files.record import encode
from portllm.progress import silent
from portllm.running.model import Device
from portllm.study.definition.plan import Identities, steps_of
from portllm.study.definition.settings import Study
from portllm.study.schedule.places import Places
from portllm.study.schedule.shared import require_mark
from portllm.study.schedule.work import StepRunner, open_inputs


@dataclass(frozen=True, slots=True)
class Assignment:
    """What every step of a run has in common, for workers on any machine.

    Attributes:
        study: The study.
        out: Its folder, which the worker must see too.
        mark: What stands in that folder, so that another one of the same name is told from it.
        data: The folder that its data lie in.
        device: Where models run.
        identities: Of base and data, as the run found them.
        versions: Of the programs, in the run.
    """

    study: Study
    out: Path
    mark: str
    data: Path | None
    device: Device
    identities: Identities
    versions: Mapping[str, str]


class StepWorker:
    """Does one step after another; what the study reads is opened for the first and stays open."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._steps = {step.name: step for step in steps_of(assignment.study)}

    def do(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Do a step and write its record.

        Args:
            job: `step`, its name, and `inputs`, all that its result depends on but versions.

        Returns:
            `record`, or `reason` where it failed, with whether it `can_pass`.
        """
        step, places = self._steps[job["step"]], Places(self._assignment.out)
        try:
            work = self._work  # before the record is touched: the folder may not be the study's
            record = do(
                places.record_file(step),
                inputs=job["inputs"],
                identify=lambda: places.identify(step),
                work=lambda: work.do(step),
            )
        except PortLLMError as error:
            return {"reason": str(error), "can_pass": isinstance(error, OutputBusyError | RemoteError)}
        except Exception:  # a bug: its traceback is the reason
            return {"reason": traceback.format_exc().strip(), "can_pass": False}
        return {"record": encode(record)}

    @cached_property
    def _work(self) -> StepRunner:
        """What does the steps, once it is sure that here they come out as in the run.

        Raises:
            WorkersError: Another version of a program is installed here.
            OutputError: The study's folder is not to be seen from here.
            DataError: Base or data are others here.
        """
        asked, here = self._assignment, socket.gethostname()
        for name, version in asked.versions.items():
            if versions()[name] != version:
                raise WorkersError(
                    f"machine '{here}' has {name} {versions()[name]}, but this run has {version}. Install the "
                    "same version everywhere."
                )
        require_mark(asked.out, asked.mark)
        inputs = open_inputs(asked.study, asked.data)
        if inputs.identities() != asked.identities:
            raise DataError(
                f"on machine '{here}' the study's base or data differ from those of this run. Both must be the "
                "same everywhere: put them on a shared file system, or pin the base's revision."
            )
        return StepRunner(asked.study, inputs, Places(asked.out), asked.device, silent)
