"""What a patch learns from: rows with labels, or prompts that an older tuned model answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.errors import refuse
from portllm.files.input_file import unchanged
from portllm.files.record import encode
from portllm.files.source import Source
from portllm.matching.base import base_refusals
from portllm.matching.compatibility import mismatches
from portllm.patch.adapter_folder import digest_tensors, files_of, folder_of
from portllm.patch.identify import identify
from portllm.patch.patch import Patch
from portllm.progress import Progress
from portllm.running.chat_template import read_chat_template
from portllm.running.data import Data, chat_template_for
from portllm.running.device import Device
from portllm.running.examples import Border
from portllm.running.folder import model_folder
from portllm.running.shapes import Content, Conversation
from portllm.tensors.info import TensorInfo
from portllm.training.settings import TrainReport, TrainSettings


@dataclass(frozen=True, slots=True)
class Labels:
    """Prompts and their completions; the loss counts completions.

    Attributes:
        rows: The prompts and completions.
        recorded: What the record says of them.
        files: The files they were read from.
        border: How completions follow prompts.
    """

    rows: Sequence[Content]
    recorded: Mapping[str, object]
    files: tuple[Source, ...] = ()
    border: Border = field(default_factory=Border)

    @property
    def teacher(self) -> None:
        """Nobody: the answers are in the file."""

    def fit(
        self,
        base: Path,
        adapter: Path,
        settings: TrainSettings,
        *,
        template: str | None,
        device: Device,
        start: Path | None,
        progress: Progress,
    ) -> TrainReport:
        """Train an adapter on a base; see `portllm.training.lora`."""
        from portllm.training.lora import train_lora  # loads torch, which reading rows does not need

        return train_lora(
            base,
            self.rows,
            settings,
            adapter,
            border=self.border,
            template=template or "",
            device=device,
            start=start,
            progress=progress,
        )

    def template(self, folder: Path) -> str | None:
        """The chat template of conversations: that of the base."""
        return read_chat_template(folder) if any(isinstance(row, Conversation) for row in self.rows) else None


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
        data: The prompts.
        teacher: Who answers them.
        files: The files that prompts and teacher were read from.
    """

    data: Data
    teacher: Teacher
    files: tuple[Source, ...]

    @property
    def rows(self) -> Sequence[Content]:
        """The rows of the file."""
        return self.data.rows

    @property
    def recorded(self) -> dict[str, object]:
        """What the record says of prompts and teacher."""
        teacher = {
            "base": encode(identify(self.teacher.base)),
            "patch": origin_of(self.teacher.patch),
            "max_new_tokens": self.teacher.max_new_tokens,
        }
        return {**self.data.recorded, **_completion_of(self.teacher.patch), "teacher": teacher}

    def fit(
        self,
        base: Path,
        adapter: Path,
        settings: TrainSettings,
        *,
        template: str | None,
        device: Device,
        start: Path | None,
        progress: Progress,
    ) -> TrainReport:
        """Train an adapter on a base; both models are in memory."""
        from portllm.running.wording import word
        from portllm.training.distil_lora import TeacherFolders, distil_lora

        patch, model = self.teacher.patch, self.teacher.base
        folders = TeacherFolders(model_folder(model, progress=progress), folder_of(patch), self.teacher.max_new_tokens)
        with unchanged((*model.files, *files_of(patch))):
            asked = word(self.data, base, template)
            return distil_lora(
                base,
                asked.prompts,
                folders,
                settings,
                adapter,
                border=asked.border,
                device=device,
                start=start,
                progress=progress,
            )

    def template(self, folder: Path) -> str | None:
        """The chat template of conversations: the one that the teacher was trained through."""
        return chat_template_for(self.data, self.teacher.patch, folder=folder)


Lesson = Labels | Answers


def read_labels(data: Data) -> Labels:
    """The rows of a data file, to be learned."""
    return Labels(data.rows, data.recorded, (data.file,), data.border)


def read_questions(data: Data, teacher: Teacher) -> Answers:
    """The prompts of a data file, for a teacher to answer; no answer in the file is read.

    Args:
        data: The rows.
        teacher: Who answers them.

    Raises:
        PlanRefusedError: The teacher's patch is not one of its base.
    """
    patch, base = teacher.patch, teacher.base
    refuse({*mismatches(patch, base), *base_refusals(patch, base, option="--teacher")})
    return Answers(data, teacher, (data.file, *teacher.base.files, *files_of(teacher.patch)))


def origin_of(patch: Patch[TensorInfo]) -> dict[str, object]:
    """What a record says of another patch: its name, its tensors, and where it comes from and was ported to."""
    record = {} if patch.record is None else encode(patch.record)
    known: dict[str, object] = {name: record[name] for name in ("base", "capture", "ports") if name in record}
    return {"name": patch.name, "tensors": dict(sorted(digest_tensors(patch).items())), **known}


def _completion_of(patch: Patch[TensorInfo]) -> dict[str, object]:
    """The field of the right answer, where the teacher knows it: for `evaluate`, not for training."""
    settings = patch.record.capture.settings if patch.record else {}
    return {"completion": settings["completion"]} if "completion" in settings else {}
