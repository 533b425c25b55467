"""Rows of one's own to compare models on, and how answers are judged; read before torch is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from portllm.checkpoint.tensor.info import TensorInfo
from portllm.patch.patch import Patch
from portllm.running.data import Data, require_template

if TYPE_CHECKING:
    from portllm.evaluating.scoring import Task


@dataclass(frozen=True, slots=True)
class FileRows:
    """The rows of a data file as a task to be; see `Task` for what is not said here.

    Attributes:
        data: The rows.
        kind: How answers are judged.
        labels: All possible answers.
        limit: Only so many of the first rows.
        max_tokens: Maximum tokens per row.
        max_new_tokens: Maximum number of tokens to generate.
        batch_size: Rows per forward pass.
    """

    data: Data
    kind: Literal["labels", "text"] = "labels"
    labels: tuple[str, ...] = ()
    limit: int | None = None
    max_tokens: int = 512
    max_new_tokens: int = 32
    batch_size: int = 16

    def check(self, patch: Patch[TensorInfo], folder: Path) -> None:
        """See to it that prompts can be made by the model in a folder, as the patch knows them.

        Raises:
            DataError: It has no chat template, or another than the patch was trained through.
        """
        require_template(self.data, patch, self.data.template_of(folder), model=folder.name)

    def task(self, folder: Path) -> "Task":
        """The task; the chat template of the model in a folder makes prompts of conversations."""
        from portllm.evaluating.scoring import Task
        from portllm.running.wording import word

        asked = word(self.data, folder)
        return Task(
            examples=asked.examples[: self.limit],
            kind=self.kind,
            labels=self.labels,
            max_tokens=self.max_tokens,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            border=asked.border,
        )
