"""What of a study is done: the records of its steps, against what each step depends on now."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from portllm.files.kept_results import Record, do, identity_or_none, read_record, with_versions
from portllm.files.staging import remove
from portllm.study.definition.plan import Identities, Step, data_of, needed, settings_of, steps_of
from portllm.study.definition.settings import Study
from portllm.study.schedule.places import Places


@dataclass
class Ledger:
    """The records of a study in its folder.

    A record counts where all its inputs are those of now: settings, base, data, versions, and what the steps before it
    wrote. What a record's step wrote may be gone, and is made again if a step needs it; if it is there, it must be what
    was written.

    Attributes:
        study: The study.
        places: Where records and outputs are.
        identities: Of base and data.
        any_version: Whether records of other versions of the programs count, as they do for a report.
    """

    study: Study
    places: Places
    identities: Identities
    any_version: bool = False
    steps: tuple[Step, ...] = field(init=False)
    _records: dict[str, Record | None] = field(init=False, default_factory=dict)
    _there: dict[str, bool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.steps = steps_of(self.study)
        for step in self.steps:
            self._records[step.name] = read_record(self.places.record_file(step))
            found = identity_or_none(lambda step=step: self.places.identify(step))  # type: ignore[misc]
            known = self._records[step.name]
            self._there[step.name] = known is not None and found == known.files
            if found is not None and not self._there[step.name]:
                self._records[step.name] = None  # other files than the record's: nobody knows what they are

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
            self.places.record_file(step),
            inputs=self.inputs_of(step),
            identify=lambda: self.places.identify(step),
            work=work,
        )
        self.note(step, record)
        return record

    def inputs_of(self, step: Step) -> dict[str, object]:
        """All that the result of a step depends on now but versions; the steps that it reads are done."""
        return self._inputs(step, self.done())

    def note(self, step: Step, record: Record) -> None:
        """Take in what has been written for a step: its record, and the output that it stands for."""
        self._records[step.name] = record
        self._there[step.name] = True

    def drop(self) -> list[str]:
        """Remove what no step that is left reads and the study does not keep; returns the names of its steps.

        A step that is running is left, as long as it has not been noted: what it reads stays.
        """
        read = {name for step in self.left() for name in step.inputs}
        gone = []
        for step in self.steps:
            if step.makes is None or step.makes in self.study.keep or step.name in read:
                continue
            if self._there[step.name]:
                remove(self.places.folder(step.name))
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
