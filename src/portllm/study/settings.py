"""What a study's file says, as values: every field of a class is a key of its table."""

from dataclasses import dataclass

from portllm.comparison.scoring import Kind
from portllm.live.examples import ExampleFormat
from portllm.live.ranges import require_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsTask:
    """A task of the user's own rows, scored by the program itself.

    Attributes:
        train: JSONL file of the rows to train on, below the data folder.
        score: The same, of the rows to score.
        prompt: Template of the prompt.
        completion: Field that holds the completion.
        judge: Whether the likeliest label is the answer, or what the model writes.
        labels: All possible answers, where they are not those that occur.
        train_rows: How many rows to train on, from the file's beginning; None for all.
        score_rows: How many to score.
        max_tokens: Most tokens of a scored row.
        max_new_tokens: Most tokens written.
        batch_size: Rows of a forward pass.
    """

    train: str
    score: str
    prompt: str
    completion: str
    judge: Kind = "labels"
    labels: tuple[str, ...] = ()
    train_rows: int | None = None
    score_rows: int | None = None
    max_tokens: int = 512
    max_new_tokens: int = 32
    batch_size: int = 16

    def __post_init__(self) -> None:
        ExampleFormat(prompt=self.prompt, completion=self.completion)
        _require_task_ranges(self)


def _require_task_ranges(task: RowsTask) -> None:
    require_ranges(
        "task",
        ("train_rows", task.train_rows, "1 or more", task.train_rows is None or task.train_rows >= 1),
        ("score_rows", task.score_rows, "1 or more", task.score_rows is None or task.score_rows >= 1),
        ("max_tokens", task.max_tokens, "2 or more", task.max_tokens >= 2),
        ("max_new_tokens", task.max_new_tokens, "1 or more", task.max_new_tokens >= 1),
        ("batch_size", task.batch_size, "1 or more", task.batch_size >= 1),
    )
