"""Whether two models answer alike: each is loaded in turn, answers all prompts, and makes room for the other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from portllm.certifying.inputs import Respondent
from portllm.evaluating.answers import Answers, Questions, answer, count_same_tokens
from portllm.evaluating.own_tokens import load_patched
from portllm.progress import Progress, silent
from portllm.running.encoding import Encoder
from portllm.running.model import (
    Device,
    PeftModel,
    PreTrainedModel,
    choose_device,
    load_model,
    load_tokenizer,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What two models answer to the same questions.

    Attributes:
        first: Answers of the first.
        second: Answers of the second; None for free text, which is compared token by token.
        same_tokens: For free text, how many of the first model's tokens the second would write, for each prompt.
    """

    first: Answers
    second: Answers | None
    same_tokens: tuple[int, ...] | None

    @property
    def differing(self) -> tuple[int, ...] | None:
        """Indices of the prompts that are answered otherwise; None for free text."""
        if self.second is None:
            return None
        pairs = enumerate(zip(self.first.texts, self.second.texts, strict=True))
        return tuple(index for index, (one, other) in pairs if one != other)


def compare_answers(
    first: Respondent, second: Respondent, questions: Questions, *, device: Device = "auto", progress: Progress = silent
) -> Agreement:
    """Ask two models the same questions; never more than one of them is in memory.

    Args:
        first: For free text, the one whose text the other is measured against.
        second: The other.
        questions: What to ask.
        device: Device to run on.
        progress: Told of the rows done, both models together.

    Raises:
        CheckpointError: A model cannot be loaded.
        AdapterFormatError: An adapter does not fit its model.
        DataError: A prompt or a choice does not fit.
    """
    where = choose_device(device)
    total, done = 2 * len(questions.prompts), 0

    def ticking(name: str) -> Callable[[int], None]:
        progress(f"certify: {name}", done, total, "rows")

        def tick(n_rows: int) -> None:
            nonlocal done
            done += n_rows
            progress(f"certify: {name}", done, total, "rows")

        return tick

    model, encoder = _load(first, questions, where)
    answers = answer(model, encoder, questions, device=where, tick=ticking(first.name))
    del model  # before the other one is loaded
    model, encoder = _load(second, questions, where)
    tick = ticking(second.name)
    if questions.kind == "free":
        same = count_same_tokens(model, encoder, questions, answers.tokens, device=where, tick=tick)
        return Agreement(first=answers, second=None, same_tokens=same)
    others = answer(model, encoder, questions, device=where, tick=tick)
    return Agreement(first=answers, second=others, same_tokens=None)


def _load(
    respondent: Respondent, questions: Questions, device: torch.device
) -> tuple[PreTrainedModel | PeftModel, Encoder]:
    folder, longest = respondent.folder, questions.longest
    if respondent.adapter is not None:
        return load_patched(folder, respondent.adapter, device=device, longest=longest)
    return load_model(folder, device=device, longest=longest), Encoder(load_tokenizer(folder))
