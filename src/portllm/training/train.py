"""A patch by LoRA fine-tuning, captured with the record of what it was trained on."""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.errors import PortLLMError, Refusal, refuse
from portllm.files.input_file import unchanged
from portllm.files.output_folder import check_apart, check_free
from portllm.files.source import Source
from portllm.matching.base import base_refusals
from portllm.matching.compatibility import mismatches
from portllm.patch.adapter_folder import PatchLike, files_of, folder_of, load_patch
from portllm.patch.patch import Patch
from portllm.progress import Progress, silent
from portllm.running.chat_template import template_digest
from portllm.running.data import read_data
from portllm.running.device import Device
from portllm.running.folder import check_runnable, model_folder
from portllm.running.shapes import shown
from portllm.tensors.info import TensorInfo
from portllm.training.lessons import Lesson, Teacher, origin_of, read_labels, read_questions
from portllm.training.settings import TrainReport, TrainSettings


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of a training.

    Attributes:
        base: The model; a folder with configuration and tokenizer.
        lesson: What is learned.
        out: The patch's folder.
        settings: Rank, learning rate and other settings.
        start: A patch of this base to train on, such as a ported one; its rank, alpha and modules are kept.
        overwrite: Replace `out` if it exists.
    """

    base: Checkpoint
    lesson: Lesson
    out: Path
    settings: TrainSettings = field(default_factory=TrainSettings)
    start: Patch[TensorInfo] | None = None
    overwrite: bool = False

    def preview(self) -> str:
        """What a run would do, after everything has been checked that can be without running a model."""
        self._check()
        teacher = self.lesson.teacher
        began = "" if self.start is None else f", beginning with {self.start.name},"
        taught = "" if teacher is None else f" that {teacher.patch.name} answers"
        what = f"a patch of {self.base.name}{began} on {len(self.lesson.rows)} rows{taught}"
        return f"would train {what}; the first:\n{shown(self.lesson.rows[0])}\nto {self.out}"

    def run(self, *, device: Device = "auto", progress: Progress = silent) -> tuple[Patch[TensorInfo], TrainReport]:
        """Train, and write the patch.

        Args:
            device: Device to train on.
            progress: Progress callback (downloaded bytes, answers of a teacher, steps).

        Returns:
            The patch, opened from `out`, and a report of the training.

        Raises:
            DataError: The models do not share their tokens.
            PlanRefusedError: `start` cannot be trained on.
            NotFoundError: A model is a single file, without configuration and tokenizer.
            OutputExistsError: `out` exists; raised before any work is done.
        """
        self._check()
        folder = model_folder(self.base, progress=progress)
        template = self.lesson.template(folder)
        worded = {} if template is None else {"chat_template": template_digest(template)}
        first = None if self.start is None else folder_of(self.start)
        with tempfile.TemporaryDirectory(prefix="portllm-train-") as scratch:
            adapter = Path(scratch) / "adapter"
            with unchanged(self._start_files):
                report = self.lesson.fit(
                    folder,
                    adapter,
                    self.settings,
                    template=template,
                    device=device,
                    start=first,
                    progress=progress,
                )
            ran = {"rows": report.n_rows, "rows_cut": report.n_cut_rows, "steps": report.steps}
            began = {} if self.start is None else _began_with(self.start)
            patch = capture_adapter(
                load_patch(adapter),
                base=self.base,
                out=self.out,
                method="train",
                settings={**asdict(self.settings), **began, **self.lesson.recorded, **worded, **ran},
                overwrite=self.overwrite,
            )
        return patch, report

    @property
    def _start_files(self) -> tuple[Source, ...]:
        return () if self.start is None else tuple(files_of(self.start))

    def _check(self) -> None:
        check_free(self.out, overwrite=self.overwrite)
        check_apart(self.out, [*self.lesson.files, *self.base.files, *self._start_files])
        for model in (self.base, *(() if self.lesson.teacher is None else (self.lesson.teacher.base,))):
            check_runnable(model)
        if self.base.folder is not None:
            self.lesson.template(self.base.folder)
        if self.start is not None:
            refuse(set(_start_refusals(self.start, self.base)))


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
        data: A data file: JSONL, JSON, CSV or Parquet; see `docs/data.md`.
        out: The patch's folder.
        prompt: Prompt template such as `"Question: {question} Type:"`; None for that of `start` or `teacher`, or for
            rows with `messages`, `prompt` and `completion`, or `text`.
        completion: Field with the target text; None for the one recorded in `start`, or with a teacher.
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
    first = None if start is None else load_patch(start)
    rows = read_data(
        Path(data),
        *(load_patch(patch) for patch in (start if teacher is None else teacher,) if patch is not None),
        prompt=prompt,
        completion=completion,
        answers=teacher is None,
    )
    old = None
    if teacher is not None and teacher_base is not None:
        old = Teacher(open_checkpoint(teacher_base, progress=progress), load_patch(teacher), max_new_tokens or 32)
    training = Training(
        base=open_checkpoint(base, progress=progress),
        lesson=read_labels(rows) if old is None else read_questions(rows, old),
        out=Path(out),
        settings=settings or TrainSettings(),
        start=first,
        overwrite=overwrite,
    )
    return training.run(device=device, progress=progress)


def _start_refusals(start: Patch[TensorInfo], base: Checkpoint) -> Iterator[Refusal]:
    """Why a patch cannot be trained on with a base."""
    yield from mismatches(start, base)
    yield from base_refusals(start, base, option="--init-from")
    if not start.is_plain_lora:
        yield Refusal(
            "--init-from",
            f"{start.name} contains more than LoRA deltas (a DoRA magnitude, experts, saved tensors, token rows "
            "or biases), but training can only continue from LoRA factors. Train a new patch.",
        )


def _began_with(start: Patch[TensorInfo]) -> dict[str, object]:
    """What of the settings is the first patch's, and which that was."""
    fields = start.config.fields
    return {
        "rank": fields["r"],
        "alpha": fields.get("lora_alpha", 8),
        "target_modules": fields["target_modules"],
        "use_rslora": bool(fields.get("use_rslora")),
        "init_from": origin_of(start),
    }
