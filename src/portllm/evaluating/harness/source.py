"""A task of lm-evaluation-harness as a study and a comparison ask for one: rows to train on, and a way to score."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from blake3 import blake3

from portllm.evaluating.harness.scoring import score_task
from portllm.evaluating.harness.task import HarnessTask, Question, as_example
from portllm.evaluating.scoring import Scores, Tick
from portllm.running.encoding import Encoder
from portllm.running.examples import Example
from portllm.running.model import PeftModel, PreTrainedModel

MARKS = 4
"""Tokens that a tokenizer may put around a text."""


class HarnessRows:
    """Rows of a task of the harness, read when it is made.

    Args:
        name: As the harness calls it.
        data: A folder of JSONL files, by tasks; without it, the rows come from the hub.
        train_rows: How many rows to train on, from the beginning of the training split; None for all.
        port_rows: How many of the training rows behind those give prompts to methods that run models on some.
        score_rows: How many rows to score, from the beginning of the split that the harness scores; None for all.
        max_tokens: Most tokens of an input; None for what the model takes.
        max_new_tokens: Most tokens written; None for what the task says.
        batch_size: Inputs of a forward pass.

    Raises:
        DataError: There is no such task, its rows cannot be had, or it tells no right answers from wrong ones.
    """

    def __init__(
        self,
        name: str,
        *,
        data: str | Path | None = None,
        train_rows: int | None = None,
        port_rows: int = 0,
        score_rows: int | None = None,
        max_tokens: int | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 16,
    ) -> None:
        self._task = HarnessTask(name, data=None if data is None else Path(data))
        self._train_rows = train_rows
        self._port_rows = port_rows
        self._questions = self._task.scored_questions(score_rows)
        self._max_tokens = max_tokens
        self._max_new_tokens = max_new_tokens
        self._batch_size = batch_size

    @property
    def kind(self) -> str:
        """Who judges the answers."""
        return "lm-evaluation-harness"

    @property
    def labels(self) -> tuple[str, ...]:
        """None that all rows share: a task's choices may differ from row to row."""
        return ()

    @property
    def n_rows(self) -> int:
        """How many rows are scored."""
        return len(self._questions)

    @cached_property
    def examples(self) -> Sequence[Example]:
        """What each row asks, and the right answer, whatever stands between the two."""
        pairs = (question.pairs[question.right] for question in self._questions)
        return tuple(Example(context, continuation.strip()) for context, continuation in pairs)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest input that scoring gives a model; no text has more tokens than bytes."""
        texts = [context + continuation for question in self._questions for context, continuation in question.pairs]
        stock = self._task.stock_max_new_tokens
        written = stock if self._max_new_tokens is None else self._max_new_tokens
        bound = max(len(text.encode()) for text in texts) + MARKS + (written if self._task.generates else 0)
        return bound if self._max_tokens is None else min(bound, self._max_tokens)

    @cached_property
    def identity(self) -> Mapping[str, object]:
        """All that scores depend on but the model."""
        return {
            "kind": "harness",
            "name": self._task.name,
            "score": digest(self._questions),
            "max_tokens": self._max_tokens,
            "max_new_tokens": self._max_new_tokens,
            "lm_eval": importlib.metadata.version("lm_eval"),
        }

    def port_prompts(self) -> Sequence[str]:
        """The prompts of the rows behind those to train on, each with the first choice where a choice is part of it."""
        return tuple(as_example(*question.pairs[0]).prompt for question in self._questions_to_learn[self._n_training :])

    def train_examples(self) -> Sequence[Example]:
        """The rows to train on, in order: prompt and right answer as the harness strings them together.

        Raises:
            DataError: The task has no rows to train on, or fewer than asked for.
        """
        return tuple(question.example for question in self._questions_to_learn[: self._n_training])

    @cached_property
    def _questions_to_learn(self) -> list[Question]:
        rows = self._train_rows
        return self._task.training_questions(None if rows is None else rows + self._port_rows)

    @property
    def _n_training(self) -> int:
        return len(self._questions_to_learn) - self._port_rows

    def score(
        self, model: PreTrainedModel | PeftModel, encoder: Encoder, *, device: torch.device, tick: Tick
    ) -> Scores:
        """Answers every row with a model; see `score_task`."""
        return score_task(
            model,
            encoder.tokenizer,
            self._task,
            self._questions,
            device=device,
            max_tokens=self._max_tokens,
            max_new_tokens=self._max_new_tokens,
            batch_size=self._batch_size,
            tick=tick,
        )


def digest(questions: Sequence[Question]) -> str:
    """A digest of contexts, continuations and right answers, in their order."""
    return blake3(repr([(question.pairs, question.right) for question in questions]).encode()).hexdigest()
