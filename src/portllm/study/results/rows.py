"""The rows of a study's results, as values and as JSON."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from portllm.evaluating.metrics import Estimate, Retention
from portllm.notebook import ShownInNotebook

Outcome = Literal["ahead", "level", "behind", "nothing learned"]
"""What came of a port, in accuracy against retraining: told apart by the 95 % interval over rows, or not."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What one of the five models scored on a task.

    Attributes:
        accuracy: Share of right answers, mean over seeds, with its interval over rows.
        loss: Nats per token of the right completion, the same.
        by_seed: Accuracy of each seed; one value where there is no patch.
        spread: Standard deviation of these; None for one.
        answers: Share of the rows that each answer was given to, right or wrong, mean over seeds, the commonest first;
            empty where there are too many for labels.
        words: Of an answer, mean over rows and seeds; None where answers are labels.
    """

    accuracy: Estimate
    loss: Estimate
    by_seed: tuple[float, ...]
    spread: float | None
    answers: Mapping[str, float]
    words: float | None


@dataclass(frozen=True, slots=True)
class Spectra:
    """Singular values of three deltas, falling: the root of the mean square over modules and seeds of each.

    The squares of all, times the number of modules, add up to the mean over seeds of the squared Frobenius norm.

    Attributes:
        ported: Of the ported delta.
        retrained: Of the retrained one.
        residual: Of the port residual, retrained minus ported.
    """

    ported: tuple[float, ...]
    retrained: tuple[float, ...]
    residual: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """What `check` said of the patches of a task on an evolved model.

    Attributes:
        verdicts: Of each seed's patch.
        weights: Measures of weights by name, means over seeds.
        text: The same of prompts; empty where the study gives none.
    """

    verdicts: tuple[str, ...]
    weights: Mapping[str, float]
    text: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One task on one evolved model, by one method.

    Attributes:
        evolution: By name.
        link: How many updates.
        task: By name.
        method: How the patch was ported.
        seeds: Those of which everything was scored.
        scored: The five models, as far as they have been scored, and the one retrained with other seeds.
        commonest: Accuracy of giving every row the commonest right answer; None where answers are texts, or no model
            gives the right answer to some row.
        gain: Accuracy of retrained minus evolved.
        outcome: Of the port. Where the gain is not told apart from nothing, there was nothing to keep.
        change: Accuracy of ported minus patched.
        behind: Accuracy of ported minus retrained.
        over_add: Accuracy of ported minus ported by addition; None for addition itself, and where the study lacks it.
        luck: Accuracy of retrained with other seeds minus retrained: the yardstick for `behind`.
        accuracy_retention: Share of retraining's gain in accuracy.
        loss_retention: The same for the loss.
        negative_flips: Rows that the patched base answers right and the ported patch wrong; mean over seeds.
        residual_of_delta: The port residual's norm against that of the retrained delta, mean over seeds; None where the
            study measures no theory.
        residual_of_update: The same against the updated weights with the patch in them, the paper's yardstick.
        spectra: Singular values of the deltas and of the residual; None likewise.
        checked: What `check` said before the patch was ported; None where the study does not ask.
        agreement: Share of the scored rows that the ported patch answers as base + patch does, mean over seeds.
        measured: What the port said of itself, means over seeds.
    """

    evolution: str
    link: int
    task: str
    method: str
    seeds: tuple[int, ...]
    scored: Mapping[str, TaskScore]
    commonest: float | None
    gain: Estimate | None
    outcome: Outcome | None
    change: Estimate | None
    behind: Estimate | None
    over_add: Estimate | None
    luck: Estimate | None
    accuracy_retention: Retention | None
    loss_retention: Retention | None
    negative_flips: float | None
    residual_of_delta: float | None
    residual_of_update: float | None
    spectra: Spectra | None
    checked: Checked | None
    agreement: Estimate | None
    measured: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ModelRow:
    """An evolved model.

    Attributes:
        evolution: By name.
        link: How many updates.
        kind: Of evolution: `lora`, `full`, `twin` or `reinit`.
        drift: `|W1 - W0| / |W0|` against the base.
        cosine: Of base and evolved weights.
        old_loss: Of the base and of this model on the old text, in nats per token.
        new_loss: The same on the evolution's new text.
    """

    evolution: str
    link: int
    kind: str
    drift: float | None
    cosine: float | None
    old_loss: tuple[float, float] | None
    new_loss: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class StudyResults(ShownInNotebook):
    """Results of a study so far.

    Attributes:
        title: The study's.
        base: Its base.
        seeds: Its seeds.
        n_steps: Its steps.
        n_done: Of these, those that are done.
        models: Evolved models.
        tasks: Tasks on them.
        dtype: What models were scored in, as the study says it.
        compare: The published table to set beside, by name, or several.
    """

    title: str
    base: str
    seeds: tuple[int, ...]
    n_steps: int
    n_done: int
    models: tuple[ModelRow, ...]
    tasks: tuple[TaskRow, ...]
    dtype: str
    compare: str | tuple[str, ...] | None

    def __repr__(self) -> str:
        return f"StudyResults({self.title!r}, {self.n_done} of {self.n_steps} steps)"

    def to_json(self) -> dict[str, object]:
        """Every number, in types that JSON has: an end of an interval that is infinite is null."""
        return {name: _finite(value) for name, value in asdict(self).items()}


def _finite(value: object) -> object:
    match value:
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value
