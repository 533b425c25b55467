"""Score a model on the rows of a task: its likeliest label or generated text, and its loss on the correct answer.

A row of a classification is answered by the label with the highest `Σ log p(token | prompt, tokens before)`, without
division by length: what lm-evaluation-harness calls `acc`. The prompt is run once; labels of several tokens go on from
its cache, those that can win or are right.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch

from portllm.arrays import Float32
from portllm.errors import DataError
from portllm.running.encoding import Encoder, batches, encode_rows
from portllm.running.examples import Border, Example
from portllm.running.generation import write_on
from portllm.running.model import PeftModel, PreTrainedModel
from portllm.running.prefill import completion_log_probs, prefill

Kind = Literal["labels", "text"]
Tick = Callable[[int], None]


@runtime_checkable
class Scored(Protocol):
    """Rows that a model can be scored on, whoever asks the questions: rows of one's own, or a benchmark's.

    Row `i` is the same row whatever the model: rows of two models are compared in pairs.
    """

    @property
    def kind(self) -> str:
        """Who judges answers, and how: `labels` and `text` as in `Task`, or the name of a benchmark."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The possible answers, where all rows have the same and one of them is chosen."""

    @property
    def n_rows(self) -> int:
        """How many rows it has."""

    @property
    def examples(self) -> Sequence[Example]:
        """What each row asks, and the right answer: for people, not for a model."""

    @property
    def longest(self) -> int:
        """Tokens of the longest input that scoring gives a model."""

    def score(
        self, model: PreTrainedModel | PeftModel, encoder: Encoder, *, device: torch.device, tick: Tick
    ) -> "Scores":
        """Answers every row with a model.

        Args:
            model: In evaluation mode, with the adapter that counts switched on, or without any.
            encoder: Of the model.
            device: Where the model is.
            tick: Told how many rows each batch had.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task: rows to answer, and how answers are judged.

    Attributes:
        examples: Prompts with the right completions.
        kind: `labels`: the likeliest of `labels` is the answer. `text`: what the model writes, greedily, up to the
            end mark or the line's end (where no right answer has two lines), must be the completion, whitespace around
            it apart.
        labels: All possible answers, for `labels`; without them, the completions that occur.
        max_tokens: Maximum tokens per row; longer prompts are truncated from the left, as in training.
        max_new_tokens: Maximum number of tokens to generate, for `text`.
        batch_size: Rows per forward pass; affects results only by rounding.
        border: How an answer follows a prompt.

    Raises:
        DataError: There are no examples, fewer than two labels, or a completion that is no label.
    """

    examples: tuple[Example, ...] = field(repr=False)
    kind: Kind = "labels"
    labels: tuple[str, ...] = ()
    max_tokens: int = 512
    max_new_tokens: int = 32
    batch_size: int = 16
    border: Border = field(default_factory=Border)

    def __post_init__(self) -> None:
        if not self.examples:
            raise DataError("task: no examples were given; expected at least one.")
        if self.kind == "text":
            return
        completions = sorted({example.completion for example in self.examples})
        if not self.labels:
            object.__setattr__(self, "labels", tuple(completions))
        strangers = [completion for completion in completions if completion not in self.labels]
        if strangers:
            shown = ", ".join(f"'{stranger}'" for stranger in strangers[:10])
            raise DataError(
                f"task: these answers are not among the labels ({', '.join(map(repr, self.labels[:10]))}): {shown}. "
                "Add them to the labels, or correct the rows."
            )
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise DataError(
                f"task: the labels are {', '.join(map(repr, self.labels))}; expected two or more, each once. Pass "
                "the labels, or judge by the generated text."
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest input that a model can be given."""
        return self.max_tokens + (self.max_new_tokens if self.kind == "text" else 0)

    @property
    def n_rows(self) -> int:
        """How many rows it has."""
        return len(self.examples)

    def score(
        self, model: PreTrainedModel | PeftModel, encoder: Encoder, *, device: torch.device, tick: Tick
    ) -> "Scores":
        """The function `score`, as a method: what `Scored` asks for."""
        return score(model, encoder, self, device=device, tick=tick)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What one model made of a task, row by row.

    Attributes:
        answers: Its answers.
        correct: Whether they are right.
        losses: What the right completion costs it, in nats per token, the end mark apart.
        n_cut_rows: Rows whose prompt was too long and lost its beginning.
        seconds: Of the forward passes.
        metrics: What a benchmark makes of the same rows by its own rules, by name; empty for rows of one's own.
    """

    answers: tuple[str, ...]
    correct: tuple[bool, ...]
    losses: tuple[float, ...]
    n_cut_rows: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


def score(
    model: PreTrainedModel | PeftModel,
    encoder: Encoder,
    task: Task,
    *,
    device: torch.device,
    tick: Tick = lambda _: None,
) -> Scores:
    """Answers every row of a task with a model.

    Args:
        model: A causal language model in evaluation mode, with the adapter that counts switched on.
        encoder: Of the model.
        task: Rows, and how to judge.
        device: Where the model is.
        tick: Told how many rows each batch had.

    Raises:
        DataError: A completion does not fit into `task.max_tokens`.
    """
    began = time.perf_counter()
    encoder = encoder.at(task.border)
    with torch.inference_mode():
        run = _score_labels if task.kind == "labels" else _score_text
        answers, losses, n_cut = run(model, encoder, task, device, tick)
    correct = [answer == example.completion for answer, example in zip(answers, task.examples, strict=True)]
    return Scores(
        answers=tuple(answers),
        correct=tuple(correct),
        losses=tuple(losses),
        n_cut_rows=n_cut,
        seconds=time.perf_counter() - began,
    )


def encode_labels(
    encoder: Encoder, texts: Sequence[str], labels: Sequence[str], *, max_tokens: int
) -> tuple[list[tuple[int, ...]], list[list[tuple[int, ...]]], int]:
    """The ids of each prompt, the ids of every label after it, and how many prompts lost their beginning.

    Raises:
        DataError: A label leaves no room for a prompt.
    """

    def encode(text: str) -> tuple[tuple[int, ...], int, list[tuple[int, ...]]]:
        encoded = [encoder.encode(text, label) for label in labels]
        # All labels of a row are asked of the same prompt: what the longest of them, and an end mark, leave room for.
        room = max_tokens - 1 - max(len(each.completion) for each in encoded)
        return *encoder.cut_prompt(encoded[0].prompt, room=room), [each.completion for each in encoded]

    rows = encode_rows(texts, encode, max_tokens=max_tokens)
    return [prompt for prompt, _, _ in rows], [ids for _, _, ids in rows], sum(n_cut > 0 for _, n_cut, _ in rows)


def label_log_probs(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[tuple[int, ...]],
    labels: Sequence[Sequence[tuple[int, ...]]],
    *,
    device: torch.device,
    counted: Sequence[Collection[int]] | None = None,
) -> Float32[torch.Tensor, "rows labels"]:
    """`Σ log p(token | prompt, tokens before)` of each label of each row.

    Args:
        model: A causal language model.
        prompts: Ids of the prompts.
        labels: For each prompt, the ids of every label; as many labels for each.
        device: Where the model is.
        counted: Of each row, the labels whose value counts besides the largest; None for all. Any other label is given
            its first token's log-probability where that alone is less than what another label has: it cannot win.
    """
    is_whole = torch.tensor([[len(label) == 1 for label in ids] for ids in labels], device=device)
    read = prefill(model, prompts, device=device, goes_on=not bool(is_whole.all()))
    firsts = torch.tensor([[label[0] for label in ids] for ids in labels], device=device)
    sums: torch.Tensor = read.next_logits.log_softmax(dim=-1).gather(1, firsts)
    asked = torch.ones_like(is_whole) if counted is None else torch.zeros_like(is_whole)
    for row, columns in enumerate(counted or ()):
        asked[row, [*columns, int(sums[row].argmax())]] = True
    # Tokens only lower a sum: once the likeliest beginning has been read to its end, few others can still win.
    while pairs := (asked & ~is_whole).nonzero().tolist():
        rows, columns = (list(each) for each in zip(*pairs, strict=True))
        sums[rows, columns] += read.go_on(rows, [labels[row][column] for row, column in pairs])
        is_whole |= asked
        asked = sums >= sums.where(is_whole, -math.inf).max(dim=1, keepdim=True).values
    return sums


def _score_labels(
    model: PreTrainedModel | PeftModel, encoder: Encoder, task: Task, device: torch.device, tick: Tick
) -> tuple[list[str], list[float], int]:
    texts = [example.prompt for example in task.examples]
    prompts, labels, n_cut_rows = encode_labels(encoder, texts, task.labels, max_tokens=task.max_tokens)
    answers, losses = [""] * len(prompts), [0.0] * len(prompts)
    rights = [task.labels.index(example.completion) for example in task.examples]
    for batch in batches(list(map(len, prompts)), batch_size=task.batch_size):
        sums = label_log_probs(
            model,
            [prompts[row] for row in batch],
            [labels[row] for row in batch],
            device=device,
            counted=[(rights[row],) for row in batch],
        )
        for row, log_probs in zip(batch, sums.cpu(), strict=True):
            right = rights[row]
            answers[row] = task.labels[int(log_probs.argmax())]
            losses[row] = -float(log_probs[right]) / len(labels[row][right])
        tick(len(batch))
    return answers, losses, n_cut_rows


def _score_text(
    model: PreTrainedModel | PeftModel, encoder: Encoder, task: Task, device: torch.device, tick: Tick
) -> tuple[list[str], list[float], int]:
    rows = encode_rows(
        task.examples,
        lambda row: encoder.encode(row.prompt, row.completion, max_tokens=task.max_tokens, reserve=1),
        max_tokens=task.max_tokens,
    )
    one_line = not any("\n" in example.completion for example in task.examples)
    answers, losses = [""] * len(rows), [0.0] * len(rows)
    for batch in batches([len(row.prompt) for row in rows], batch_size=task.batch_size):
        read = prefill(model, [rows[index].prompt for index in batch], device=device)
        log_probs = completion_log_probs(read, [rows[index].completion for index in batch]).tolist()
        written = write_on(read, encoder, max_new_tokens=task.max_new_tokens, one_line=one_line)
        for position, index in enumerate(batch):
            answers[index] = answer_text(encoder, written[position], one_line=one_line)
            losses[index] = -log_probs[position] / len(rows[index].completion)
        tick(len(batch))
    return answers, losses, sum(row.n_cut > 0 for row in rows)


def answer_text(encoder: Encoder, tokens: Sequence[int], *, one_line: bool) -> str:
    """The answer of written tokens, without marks and whitespace around it; its first line, if asked for."""
    text = encoder.decode(tokens)
    if end := encoder.border.end.strip():  # of a template whose end mark is plain text
        text = text.partition(end)[0]
    text = text.strip()
    return text.splitlines()[0].strip() if one_line and text else text
