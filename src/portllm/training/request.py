"""Training requests: from labels or from a teacher, from scratch or from a patch."""

from dataclasses import dataclass
from pathlib import Path

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import DataError, PlanRefusedError, PortLLMError
from portllm.files.input_file import local_file
from portllm.files.output_folder import check_apart, check_free
from portllm.patch.adapter_folder import PatchLike, load_patch
from portllm.patch.patch import Patch
from portllm.progress import Progress, silent
from portllm.running.examples import ExampleFormat, read_examples, read_texts
from portllm.running.folder import check_runnable
from portllm.running.model import Device
from portllm.running.recorded import recorded_format, recorded_prompt
from portllm.training.distil import Teacher, check_teacher, distil
from portllm.training.lora import TrainReport, TrainSettings
from portllm.training.train import start_refusals, train_on_rows


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
        if self.start is not None and (refusals := set(start_refusals(self.start, self.base))):
            raise PlanRefusedError(refusals)
        check_free(self.out, overwrite=self.overwrite)
        check_apart(self.out, [local_file(self.data)])
        began = "" if self.start is None else f", beginning with {self.start.name},"
        taught = "" if self.teacher is None else f" that {self.teacher.patch.name} answers"
        what = f"a patch of {self.base.name}{began} on {count} rows{taught}"
        return f"would train {what}; the first:\n{first}\nto {self.out}"

    def run(self, *, device: Device, progress: Progress) -> tuple[Patch[TensorInfo], TrainReport]:
        """Train, and write the patch."""
        if self.teacher is not None:
            return distil(
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
        return train_on_rows(
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

    def _format(self) -> ExampleFormat:
        if self.prompt is not None and self.completion is not None:
            return ExampleFormat(prompt=self.prompt, completion=self.completion)
        if self.start is None:
            raise DataError("train: pass prompt and completion, or a patch or teacher that records them.")
        return recorded_format(self.start, prompt=self.prompt, completion=self.completion)

    def _prompt(self, teacher: Teacher) -> str:
        return recorded_prompt(teacher.patch) if self.prompt is None else self.prompt


def train(
    base: ModelLike,
    *,
    data: str | Path,
    out: str | Path,
    prompt: str | None = None,
    completion: str | None = None,
    start: PatchLike | None = None,
    teacher: PatchLike | None = None,
    teacher_base: ModelLike | None = None,
    max_new_tokens: int | None = None,
    settings: TrainSettings | None = None,
    device: Device = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
) -> tuple[Patch[TensorInfo], TrainReport]:
    """Fine-tune a patch for a base and write it to `out`; the loss counts completions only.

    With a teacher, completions are an older patch's answers on its own base, and the loss is the mean divergence
    `KL(teacher ‖ student)` over their tokens: no answer in the data is read.

    Args:
        base: The model; a folder with configuration and tokenizer.
        data: JSONL rows.
        out: The patch's folder.
        prompt: Prompt template such as `"Question: {question} Type:"`; None for that of `start` or `teacher`.
        completion: JSONL field with the target text; None for the one recorded in `start`, or with a teacher.
        start: A patch of `base` to start from, such as a ported one; its rank, alpha and modules are kept.
        teacher: An older patch whose answers are learned instead of a completion.
        teacher_base: The model the teacher patch was made on.
        max_new_tokens: Maximum number of tokens the teacher generates; 32 by default.
        settings: Rank, learning rate and other settings.
        device: Device to train on.
        overwrite: Replace `out` if it exists.
        progress: Progress callback (answers of the teacher, steps).

    Returns:
        The patch, opened from `out`, and a report of the training.

    Raises:
        DataError: Rows are invalid, prompt or completion is unknown, or the models have different vocabularies.
        PlanRefusedError: Training cannot start from `start`, or the teacher patch does not belong to its base.
        NotFoundError: A model is a single file, without configuration and tokenizer.
        OutputExistsError: `out` exists; raised before any work is done.
    """
    if (teacher is None) != (teacher_base is None):
        raise PortLLMError("train: teacher and teacher_base must be used together.")
    if teacher is None and max_new_tokens is not None:
        raise PortLLMError("train: max_new_tokens requires a teacher. Omit it.")
    if teacher is not None and completion is not None:
        raise PortLLMError("train: completion cannot be used with a teacher, whose answers are learned instead.")
    training = Training(
        base=open_checkpoint(base, progress=progress),
        data=Path(data),
        prompt=prompt,
        completion=completion,
        start=None if start is None else load_patch(start),
        teacher=None
        if teacher is None or teacher_base is None
        else Teacher(open_checkpoint(teacher_base, progress=progress), load_patch(teacher), max_new_tokens or 32),
        settings=settings or TrainSettings(),
        out=Path(out),
        overwrite=overwrite,
    )
    return training.run(device=device, progress=progress)
