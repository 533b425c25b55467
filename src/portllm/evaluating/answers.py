"""What one model answers where nobody has said what is right: the likeliest choice, or what it writes.

The same prompts, cuts and sums as `scoring`, so that an answer here is the one that would be scored there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from portllm.errors import DataError
from portllm.evaluating.names import AnswerKind
from portllm.evaluating.scoring import Tick, answer_text, encode_labels, label_log_probs
from portllm.running.encoding import Encoder, batches, encode_prompts, pad_left, together
from portllm.running.examples import Border
from portllm.running.generation import write
from portllm.running.model import PeftModel, PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Prompts, and what counts as an answer.

    Attributes:
        prompts: At least one.
        kind: `choices`: the likeliest of `choices`. `exact`: what the model writes, greedily, whitespace around it
            apart; two answers are the same if every character is. `free`: the same text, compared token by token.
        choices: All possible answers, for `choices`.
        one_line: A written answer ends with its first line.
        max_tokens: Most tokens of a row; longer prompts are cut from the left, as in training.
        max_new_tokens: Most tokens written.
        batch_size: Rows of a forward pass; changes no result by more than rounding.
        border: How an answer follows a prompt.

    Raises:
        DataError: There are no prompts, or fewer than two choices, or one of them stands twice.
    """

    prompts: tuple[str, ...]
    kind: AnswerKind = "choices"
    choices: tuple[str, ...] = ()
    one_line: bool = False
    max_tokens: int = 512
    max_new_tokens: int = 32
    batch_size: int = 16
    border: Border = field(default_factory=Border)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError("questions: no prompts were given; expected at least one.")
        if self.kind == "choices" and (len(set(self.choices)) != len(self.choices) or len(self.choices) < 2):
            raise DataError(
                f"questions: the choices are {', '.join(map(repr, self.choices)) or 'not known'}; expected two or "
                "more, each once. List all possible answers with --choices, or compare generated answers with "
                "--answers exact."
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest input that a model can be given."""
        return self.max_tokens + (0 if self.kind == "choices" else self.max_new_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What one model answers.

    Attributes:
        texts: A choice, or what was written.
        tokens: For written answers, their ids with the end mark; else empty.
        n_cut_rows: Rows whose prompt was too long and lost its beginning.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    n_cut_rows: int


@torch.inference_mode()
def answer(
    model: PreTrainedModel | PeftModel, encoder: Encoder, questions: Questions, *, device: torch.device, tick: Tick
) -> Answers:
    """The model's answers, in the order of the prompts.

    Args:
        model: A causal language model in evaluation mode, with the adapter that counts switched on.
        encoder: Of the model.
        questions: What to ask.
        device: Where the model is.
        tick: Told how many rows each batch had.

    Raises:
        DataError: A choice leaves no room for the prompt, or a prompt has no tokens.
    """
    encoder = encoder.at(questions.border)
    texts = [""] * len(questions.prompts)
    if questions.kind == "choices":
        rows, choices, n_cut_rows = encode_labels(
            encoder, questions.prompts, questions.choices, max_tokens=questions.max_tokens
        )
        for batch in batches(list(map(len, rows)), batch_size=questions.batch_size):
            asked = [rows[i] for i in batch], [choices[i] for i in batch]
            sums = label_log_probs(model, *asked, device=device, counted=[()] * len(batch))
            for i, best in zip(batch, sums.argmax(dim=1).tolist(), strict=True):
                texts[i] = questions.choices[best]
            tick(len(batch))
        return Answers(texts=tuple(texts), tokens=(), n_cut_rows=n_cut_rows)
    rows, n_cut_rows = encode_prompts(encoder, questions.prompts, room=questions.max_tokens - 1)
    tokens: list[tuple[int, ...]] = [()] * len(rows)
    for batch in batches(list(map(len, rows)), batch_size=questions.batch_size):
        written = write(
            model,
            encoder,
            [rows[i] for i in batch],
            max_new_tokens=questions.max_new_tokens,
            one_line=questions.one_line,
            device=device,
        )
        for i, ids in zip(batch, written, strict=True):
            tokens[i] = ids
            texts[i] = answer_text(encoder, ids, one_line=questions.one_line)
        tick(len(batch))
    return Answers(texts=tuple(texts), tokens=tuple(tokens), n_cut_rows=n_cut_rows)


@torch.inference_mode()
def count_same_tokens(
    model: PreTrainedModel | PeftModel,
    encoder: Encoder,
    questions: Questions,
    tokens: Sequence[tuple[int, ...]],
    *,
    device: torch.device,
    tick: Tick,
) -> tuple[int, ...]:
    """For each prompt, how many of another model's tokens are this model's likeliest, what stands before them given.

    Each token is asked for after the other model's own text, so that one token that differs does not make all that
    follow differ.

    Args:
        model: A causal language model in evaluation mode.
        encoder: Of the model; it must have the other model's tokens.
        questions: What the other model was asked.
        tokens: What it wrote after each prompt, at least one token each.
        device: Where the model is.
        tick: Told how many rows each batch had.
    """
    encoder = encoder.at(questions.border)
    rows, _ = encode_prompts(encoder, questions.prompts, room=questions.max_tokens - 1)
    same = [0] * len(rows)
    for batch in batches(
        [len(row) + len(ids) for row, ids in zip(rows, tokens, strict=True)], batch_size=questions.batch_size
    ):
        for part in together([len(tokens[i]) for i in batch], len(encoder.tokenizer)):
            asked = batch[part]
            padded = pad_left([rows[i] + tokens[i][:-1] for i in asked], device=device)
            width = max(len(tokens[i]) for i in asked)
            logits: torch.Tensor = model(
                input_ids=padded.ids,
                attention_mask=padded.mask,
                position_ids=padded.positions,
                logits_to_keep=width,
                use_cache=False,
            ).logits
            for i, likeliest in zip(asked, logits.argmax(dim=-1).tolist(), strict=True):
                same[i] = sum(map(int.__eq__, likeliest[width - len(tokens[i]) :], tokens[i]))
            tick(len(asked))
    return tuple(same)
