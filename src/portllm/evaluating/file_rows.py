"""Rows of one's own to compare models on, and how answers are judged; read before torch is loaded."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from portllm.errors import DataError
from portllm.running.data import Data
from portllm.running.labels import are_texts

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

    Raises:
        DataError: Answers are to be labels, and are texts.
    """

    data: Data
    kind: Literal["labels", "text"] = "labels"
    labels: tuple[str, ...] = ()
    limit: int | None = None
    max_tokens: int = 512
    max_new_tokens: int = 32
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.kind == "labels" and not self.labels and are_texts(counts := Counter(self.data.answers)):
            raise DataError(
                f"'{self.data.file}': its {len(self.data.rows)} rows have {len(counts)} different answers, which are "
                "texts and no labels. Compare what is written with --judge text, or list the --labels."
            )

    def task(self, folder: Path, template: str | None) -> "Task":
        """The task.

        Args:
            folder: Of the base.
            template: The chat template that makes prompts of conversations; see `chat_template_for`.
        """
        from portllm.evaluating.scoring import Task
        from portllm.running.wording import word

        asked = word(self.data, folder, template)
        return Task(
            examples=asked.examples[: self.limit],
            kind=self.kind,
            labels=self.labels,
            max_tokens=self.max_tokens,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            border=asked.border,
        )
