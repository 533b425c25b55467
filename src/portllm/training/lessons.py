"""What a patch learns from: rows with labels, or prompts that an older tuned model answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import DataError, PlanRefusedError
from portllm.files.input_file import local_file, unchanged
from portllm.files.record import encode
from portllm.files.source import Source
from portllm.matching.compatibility import base_refusals, mismatches
from portllm.patch.adapter_folder import digest_tensors, files_of, folder_of
from portllm.patch.identify import identify
from portllm.patch.patch import Patch
from portllm.progress import Progress
from portllm.running.examples import Example, ExampleFormat, read_examples, read_texts, read_with_digest
from portllm.running.folder import model_folder
from portllm.running.model import Device
from portllm.running.recorded import recorded_format, recorded_prompt
from portllm.training.distil_lora import TeacherFolders, distil_lora
from portllm.training.lora import TrainReport, TrainSettings, train_lora


@dataclass(frozen=True, slots=True)
class Labels:
    """Prompts and their completions; the loss counts completions.

    Attributes:
        rows: The prompts and completions.
        recorded: What the record says of them.
        files: The files they were read from.
    """

    rows: Sequence[Example]
    recorded: Mapping[str, object]
    files: tuple[Source, ...] = ()

    @property
    def teacher(self) -> None:
        """Nobody: the answers are in the file."""

    def fit(
        self,
        base: Path,
        adapter: Path,
        settings: TrainSettings,
        *,
        device: Device,
        start: Path | None,
        progress: Progress,
    ) -> TrainReport:
        """Train an adapter on a base; see `portllm.training.lora`."""
        return train_lora(base, self.rows, settings, adapter, device=device, start=start, progress=progress)


@dataclass(frozen=True, slots=True)
class Teacher:
    """The old tuned model.

    Attributes:
        base: The model that the patch belongs to.
        patch: The patch.
        max_new_tokens: Most tokens that it writes after a prompt.
    """

    base: Checkpoint
    patch: Patch[TensorInfo]
    max_new_tokens: int = 32


@dataclass(frozen=True, slots=True)
class Answers:
    """Prompts that a teacher answers.

    The teacher writes a completion after each prompt, and the loss is the mean divergence `KL(teacher ‖ student)` over
    its tokens; see `portllm.training.distil_lora`.

    Attributes:
        rows: The prompts.
        teacher: Who answers them.
        prompts: What the record says of the prompts.
        files: The files that prompts and teacher were read from.
    """

    rows: Sequence[str]
    teacher: Teacher
    prompts: Mapping[str, object]
    files: tuple[Source, ...]

    @property
    def recorded(self) -> dict[str, object]:
        """What the record says of prompts and teacher."""
        teacher = {
            "base": encode(identify(self.teacher.base)),
            "patch": origin_of(self.teacher.patch),
            "max_new_tokens": self.teacher.max_new_tokens,
        }
        return {**self.prompts, "teacher": teacher}

    def fit(
        self,
        base: Path,
        adapter: Path,
        settings: TrainSettings,
        *,
        device: Device,
        start: Path | None,
        progress: Progress,
    ) -> TrainReport:
        """Train an adapter on a base; both models are in memory."""
        patch, model = self.teacher.patch, self.teacher.base
        folders = TeacherFolders(model_folder(model, progress=progress), folder_of(patch), self.teacher.max_new_tokens)
        with unchanged((*model.files, *files_of(patch))):
            return distil_lora(
                base, self.rows, folders, settings, adapter, device=device, start=start, progress=progress
            )


Lesson = Labels | Answers


def read_labels(data: Path, fmt: ExampleFormat) -> Labels:
    """The rows of a JSONL file, as prompts and completions.

    Args:
        data: The file.
        fmt: What of a row is prompt and what completion; recorded, so that `evaluate` asks the same way.

    Raises:
        DataError: Rows do not fit.
    """
    rows, digest = read_with_digest(data, lambda: read_examples(data, fmt))
    return Labels(rows, {"prompt": fmt.prompt, "completion": fmt.completion, "data": digest}, (local_file(data),))


def read_questions(data: Path, prompt: str, teacher: Teacher) -> Answers:
    """The prompts of a JSONL file, for a teacher to answer; no answer in the file is read.

    Args:
        data: The file.
        prompt: Template of the prompt.
        teacher: Who answers them.

    Raises:
        DataError: Rows do not fit.
        PlanRefusedError: The teacher's patch is not one of its base.
    """
    refusals = {
        *mismatches(teacher.patch, teacher.base),
        *base_refusals(teacher.patch, teacher.base, option="--teacher"),
    }
    if refusals:
        raise PlanRefusedError(refusals)
    rows, digest = read_with_digest(data, lambda: read_texts(data, prompt))
    files = (local_file(data), *teacher.base.files, *files_of(teacher.patch))
    return Answers(rows, teacher, {"prompt": prompt, **_completion_of(teacher.patch), "data": digest}, files)


def lesson_of(
    data: Path, *, prompt: str | None, completion: str | None, start: Patch[TensorInfo] | None, teacher: Teacher | None
) -> Lesson:
    """What there is to learn from a JSONL file.

    Args:
        data: The file.
        prompt: Template of the prompt; None for that of `teacher` or `start`.
        completion: Field of the completion; None for the one recorded in `start`, or with a teacher.
        start: The patch that is trained on.
        teacher: Who answers the prompts.

    Raises:
        DataError: Rows do not fit, or prompt or completion is unknown.
        PlanRefusedError: The teacher's patch is not one of its base.
    """
    if teacher is not None:
        return read_questions(data, recorded_prompt(teacher.patch) if prompt is None else prompt, teacher)
    if prompt is not None and completion is not None:
        return read_labels(data, ExampleFormat(prompt=prompt, completion=completion))
    if start is None:
        raise DataError("train: pass prompt and completion, or a patch or teacher that records them.")
    return read_labels(data, recorded_format(start, prompt=prompt, completion=completion))


def origin_of(patch: Patch[TensorInfo]) -> dict[str, object]:
    """What a record says of another patch: its name, its tensors, and where it comes from and was ported to."""
    record = {} if patch.record is None else encode(patch.record)
    known: dict[str, object] = {name: record[name] for name in ("base", "capture", "ports") if name in record}
    return {"name": patch.name, "tensors": dict(sorted(digest_tensors(patch).items())), **known}


def _completion_of(patch: Patch[TensorInfo]) -> dict[str, object]:
    """The field of the right answer, where the teacher knows it: for `evaluate`, not for training."""
    settings = patch.record.capture.settings if patch.record else {}
    return {"completion": settings["completion"]} if "completion" in settings else {}
