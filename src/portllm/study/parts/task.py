"""What a study asks of a task, whoever provides its rows."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

from portllm.evaluating.scoring import Scores, Tick
from portllm.running.encoding import Encoder
from portllm.running.examples import Example
from portllm.running.model import PeftModel, PreTrainedModel


@runtime_checkable
class TaskSource(Protocol):
    """Rows to train a patch on, and a way to score a loaded model on others.

    It is opened once for a run. Two sources of equal `identity` score alike; those of equal examples train alike.
    """

    @property
    def n_rows(self) -> int:
        """Rows that are scored."""

    @property
    def longest(self) -> int:
        """Tokens of the longest input that scoring gives a model."""

    @property
    def identity(self) -> Mapping[str, object]:
        """All that its scores depend on but the model, as JSON values: settings, digests of the scored rows, versions.

        Of no paths: a study goes on after its data has moved. Of no row to train on: with others of them, models that
        were not trained on them need not be scored again.
        """

    def train_examples(self) -> Sequence[Example]:
        """The rows to train on, in order."""

    def port_prompts(self) -> Sequence[str]:
        """Prompts of other rows, for methods that run models on some; nobody looks at their answers."""

    def score(
        self, model: PreTrainedModel | PeftModel, encoder: Encoder, *, device: torch.device, tick: Tick
    ) -> Scores:
        """Answers every row with a model.

        Row `i` is the same row whatever the model: rows of two models are compared in pairs.

        Args:
            model: In evaluation mode, with the adapter that counts switched on, or without any.
            encoder: Of the model; `encoder.tokenizer` is its tokenizer.
            device: Where the model is.
            tick: Told how many rows each batch had.

        Returns:
            For each row the answer, whether it is right, and the nats per token that the right completion costs.
        """
