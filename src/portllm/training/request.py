"""What `train` was asked for: from labels or from a teacher, from nothing or from a patch."""

from dataclasses import dataclass
from pathlib import Path

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import PlanRefusedError
from portllm.files.output_folder import check_apart, check_free
from portllm.patch.patch import Patch
from portllm.progress import Progress
from portllm.running.examples import ExampleFormat, read_examples, read_texts
from portllm.running.folder import check_runnable
from portllm.running.model import Device
from portllm.running.recorded import recorded_format, recorded_prompt
from portllm.training.distil import Teacher, check_teacher, distil
from portllm.training.lora import TrainReport, TrainSettings
from portllm.training.train import train, unfit_start


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of `train`; the attributes are its options."""

    base: Checkpoint
    data: Path
    prompt: str | None
    completion: str | None
    start: Patch[TensorInfo] | None
    teacher: Teacher | None
    settings: TrainSettings
    out: Path
    overwrite: bool

    def preview(self) -> str:
        """What a run would do, after everything has been checked that can be without a model."""
        first: object
        if self.teacher is not None:
            check_teacher(self.teacher)
            check_runnable(self.teacher.base)
            prompts = read_texts(self.data, self._prompt(self.teacher))
            first, count = prompts[0], len(prompts)
        else:
            rows = read_examples(self.data, self._format())
            first, count = rows[0], len(rows)
        check_runnable(self.base)
        if self.start is not None and (refusals := set(unfit_start(self.start, self.base))):
            raise PlanRefusedError(refusals)
        check_free(self.out, overwrite=self.overwrite)
        check_apart(self.out, [self.data])
        began = "" if self.start is None else f", beginning with {self.start.name},"
        taught = "" if self.teacher is None else f" that {self.teacher.patch.name} answers"
        what = f"a patch of {self.base.name}{began} on {count} rows{taught}"
        return f"would train {what}; the first:\n{first}\nto {self.out}"

    def run(self, *, device: Device, progress: Progress) -> TrainReport:
        """Train, and write the patch."""
        if self.teacher is not None:
            _, report = distil(
                self.base,
                data=self.data,
                prompt=self._prompt(self.teacher),
                teacher=self.teacher,
                out=self.out,
                settings=self.settings,
                start=self.start,
                device=device,
                overwrite=self.overwrite,
                progress=progress,
            )
            return report
        _, report = train(
            self.base,
            data=self.data,
            fmt=self._format(),
            out=self.out,
            settings=self.settings,
            start=self.start,
            device=device,
            overwrite=self.overwrite,
            progress=progress,
        )
        return report

    def _format(self) -> ExampleFormat:
        if self.prompt is not None and self.completion is not None:
            return ExampleFormat(prompt=self.prompt, completion=self.completion)
        if self.start is None:
            raise AssertionError("the command asks for both where there is no patch to say them")
        return recorded_format(self.start, prompt=self.prompt, completion=self.completion)

    def _prompt(self, teacher: Teacher) -> str:
        return recorded_prompt(teacher.patch) if self.prompt is None else self.prompt
