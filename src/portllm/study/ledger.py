"""What of a study is done: the records of its steps, against what each step depends on now."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portllm.kept import Record, do, identity_or_none, read_record, with_versions
from portllm.pipeline.written import checkpoint_identity, patch_identity
from portllm.study.plan import Identities, Step, data_of, needed, settings_of, steps_of
from portllm.study.settings import Study


@dataclass
class Ledger:
    """The records of a study in its folder.

    A record counts where all its inputs are those of now: settings, base, data, versions, and what the steps before it
    wrote. What a record's step wrote may be gone, and is made again if a step needs it; if it is there, it must be what
    was written.

    Attributes:
        study: The study.
        out: Its folder.
        identities: Of base and data.
        any_version: Whether records of other versions of the programs count, as they do for a report.
    """

    study: Study
    out: Path
    identities: Identities
    any_version: bool = False
    steps: tuple[Step, ...] = field(init=False)
    _records: dict[str, Record | None] = field(init=False, default_factory=dict)
    _there: dict[str, bool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.steps = steps_of(self.study)
        for step in self.steps:
            self._records[step.name] = read_record(self.record_file(step))
            found = identity_or_none(lambda step=step: self.identify(step))  # type: ignore[misc]
            known = self._records[step.name]
            self._there[step.name] = known is not None and found == known.files
            if found is not None and not self._there[step.name]:
                self._records[step.name] = None  # other files than the record's: nobody knows what they are

    def record_file(self, step: Step) -> Path:
        """Where a step's record is."""
        return self.out / "steps" / f"{step.name}.json"

    def folder(self, name: str) -> Path:
        """Where the output of the step of a name is."""
        return self.out / name.partition("_")[0] / name

    def identify(self, step: Step) -> str:
        """The identity of what a step wrote; empty where it writes nothing but its record."""
        match step.makes:
            case "patches":
                return patch_identity(self.folder(step.name))
            case "checkpoints":
                return checkpoint_identity(self.folder(step.name))
            case _:
                return ""

    def done(self) -> dict[str, Record]:
        """The records that count, by their steps' names."""
        counting: dict[str, Record] = {}
        for step in self.steps:
            record = self._records[step.name]
            if record is None or not all(name in counting for name in step.inputs):
                continue
            expected = with_versions(self._inputs(step, counting))
            if self.any_version:
                expected["versions"] = record.inputs.get("versions")
            if record.inputs == expected:
                counting[step.name] = record
        return counting

    def seconds(self) -> dict[Step, float]:
        """How long each step took that is done."""
        done = self.done()
        return {step: done[step.name].seconds for step in self.steps if step.name in done}

    def results(self) -> dict[Step, Mapping[str, Any]]:
        """What each step found that is done."""
        done = self.done()
        return {step: done[step.name].result for step in self.steps if step.name in done}

    def left(self) -> tuple[Step, ...]:
        """The steps to do, in order."""
        done = self.done()
        return needed(self.steps, {step.name: step.name in done for step in self.steps}, self._there)

    def do(self, step: Step, work: Callable[[], Mapping[str, object]]) -> Record:
        """Do a step, and note it; the steps that it reads are done."""
        record = do(
            self.record_file(step),
            inputs=self._inputs(step, self.done()),
            identify=lambda: self.identify(step),
            work=work,
        )
        self._records[step.name] = record
        self._there[step.name] = True
        return record

    def drop(self) -> list[str]:
        """Remove what no step that is left reads and the study does not keep; returns the names of its steps."""
        read = {name for step in self.left() for name in step.inputs}
        gone = []
        for step in self.steps:
            if step.makes is None or step.makes in self.study.keep or step.name in read:
                continue
            if self._there[step.name]:
                shutil.rmtree(self.folder(step.name))
                self._there[step.name] = False
                gone.append(step.name)
        return gone

    def _inputs(self, step: Step, counting: Mapping[str, Record]) -> dict[str, object]:
        return {
            "base": self.identities.base,
            "data": self.identities.data.get(data_of(step) or ""),
            "settings": settings_of(step, self.study),
            "steps": {name: counting[name].files for name in step.inputs},
        }
