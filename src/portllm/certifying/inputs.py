"""Inputs of a certificate: all rows of the user's file or a random sample, and what counts as an answer."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from portllm.certifying.bounds import CONFIDENCE, MOST_CONFIDENCE
from portllm.certifying.certificate import Inputs
from portllm.errors import DataError, PortLLMError
from portllm.evaluating.names import AnswerKind
from portllm.patch.patch import Patch
from portllm.running.chat_template import template_digest
from portllm.running.data import Data, read_data
from portllm.running.labels import are_texts
from portllm.tensors.info import TensorInfo

if TYPE_CHECKING:
    from portllm.evaluating.answers import Questions


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifySettings:
    """Settings of a certificate: how answers are computed and what is claimed.

    Attributes:
        kind: What counts as an answer; see `Questions`.
        choices: All possible answers; by default, for `choices`, the completions that occur.
        prompt: Prompt template; by default the one recorded in the patch.
        completion: Field with the correct answer; same default.
        one_line: Stop a generated answer at the end of its first line.
        max_tokens: Maximum tokens per row.
        max_new_tokens: Maximum number of tokens to generate.
        batch_size: Rows per forward pass.
        confidence: Confidence level of the bound.
        wanted: The accuracy loss to rule out, or None.
        sample: Number of rows to draw at random, or None for all.
        seed: Random seed of the sample.

    Raises:
        PortLLMError: A confidence or bound is not between 0 and 1, or a bound is requested for free text.
    """

    kind: AnswerKind = "choices"
    choices: tuple[str, ...] = ()
    prompt: str | None = None
    completion: str | None = None
    one_line: bool = False
    max_tokens: int = 512
    max_new_tokens: int = 32
    batch_size: int = 16
    confidence: float = CONFIDENCE
    wanted: float | None = None
    sample: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.confidence <= MOST_CONFIDENCE:
            raise PortLLMError(f"the confidence is {self.confidence}; it must be between 0 and {MOST_CONFIDENCE}.")
        if self.wanted is not None and not 0.0 < self.wanted < 1.0:
            raise PortLLMError(f"the bound is {self.wanted}; it must be between 0 and 1, such as 0.02 for 2 %.")
        if self.kind == "free" and self.wanted is not None:
            raise PortLLMError(
                "a bound is not available for free text: token agreement implies no score. Omit the bound, or "
                "compare whole answers ('exact')."
            )


@dataclass(frozen=True, slots=True)
class Respondent:
    """A model that answers.

    Attributes:
        name: For the progress.
        folder: Its checkpoint.
        adapter: An adapter folder to put on it, or None.
    """

    name: str
    folder: Path
    adapter: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked.

    Attributes:
        questions: Prompts of the rows, and what counts as an answer.
        completions: The right answers, or None.
        rows: Which rows of the file these are, the first being 1.
        inputs: The same for the certificate.
    """

    questions: "Questions"
    completions: tuple[str, ...] | None
    rows: tuple[int, ...]
    inputs: Inputs


def read_inputs(data: Path, patch: Patch[TensorInfo], settings: CertifySettings) -> Data:
    """The rows that a file holds for a patch; no model is needed for that.

    Args:
        data: The file.
        patch: Its record says how prompts are made, where the settings do not.
        settings: What to ask.

    Raises:
        DataError: Rows do not fit, there are fewer than are to be drawn, or answers are texts and no choices.
    """
    rows = read_data(
        data,
        patch,
        prompt=settings.prompt,
        completion=settings.completion,
        answers=False if settings.kind == "free" else None,
    )
    if settings.kind == "choices" and not settings.choices and are_texts(counts := Counter(rows.answers)):
        raise DataError(
            f"'{data}': its {len(rows.rows)} rows have {len(counts)} different answers, which are texts and no "
            "choices. Compare what is written with --answers exact, or list the --choices."
        )
    if settings.sample is not None and settings.sample > len(rows.rows):
        raise DataError(
            f"'{data}': has {len(rows.rows)} rows, fewer than the sample of {settings.sample}. Use a smaller sample."
        )
    return rows


def ask(data: Data, folder: Path, template: str | None, settings: CertifySettings) -> Asked:
    """The questions that rows make.

    Args:
        data: The rows.
        folder: Of the base.
        template: The chat template that makes prompts of conversations.
        settings: What to ask.

    Raises:
        DataError: No prompts can be made of the rows, or the choices are not known.
    """
    from portllm.evaluating.answers import Questions  # loads torch, which reading rows does not need
    from portllm.running.wording import word

    asked = word(data, folder, template)
    completions = None if settings.kind == "free" else asked.answers
    rows = draw_rows(len(asked.prompts), settings.sample, seed=settings.seed)
    texts = tuple(asked.prompts[row - 1] for row in rows)
    questions = Questions(
        prompts=texts,
        kind=settings.kind,
        choices=_choices(data, completions, settings) if settings.kind == "choices" else (),
        one_line=settings.one_line,
        max_tokens=settings.max_tokens,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        border=asked.border,
    )
    inputs = Inputs(
        digest=data.digest,
        rows=len(asked.prompts),
        prompt=data.wording.template,
        completion=None if completions is None else data.wording.answer_field,
        chat_template=None if template is None else template_digest(template),
        sample=settings.sample,
        seed=None if settings.sample is None else settings.seed,
        repeated=len(texts) - len(set(texts)),
        cut=0,
    )
    right = None if completions is None else tuple(completions[row - 1] for row in rows)
    return Asked(questions=questions, completions=right, rows=rows, inputs=inputs)


def draw_rows(n_rows: int, n: int | None, *, seed: int) -> tuple[int, ...]:
    """Which rows to ask, the first being 1: all, or n of them drawn without replacement, in the order of the file.

    A row is drawn if the hash of seed and number is among the n smallest, so that anyone can draw the same again.

    Example:
        >>> draw_rows(3, None, seed=0), len(draw_rows(1000, 5, seed=0))
        ((1, 2, 3), 5)
    """
    if n is None:
        return tuple(range(1, n_rows + 1))
    lots = sorted(range(1, n_rows + 1), key=lambda row: blake3(f"{seed}:{row}".encode()).digest())
    return tuple(sorted(lots[:n]))


def _choices(data: Data, completions: tuple[str, ...] | None, settings: CertifySettings) -> tuple[str, ...]:
    """All possible answers: as given, else those that are right somewhere."""
    right = sorted(set(completions or ()))
    strangers = [answer for answer in right if answer not in settings.choices]
    if settings.choices and strangers:
        shown = ", ".join(map(repr, strangers[:10]))
        raise DataError(
            f"'{data.file}': {len(strangers)} completions are not among the choices: {shown}. Add them to the choices, "
            "or correct the rows."
        )
    return settings.choices or tuple(right)
