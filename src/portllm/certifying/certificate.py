"""The certificate of a port: `certificate.json` records the inputs, the answers that differ and the resulting bound.

The same questions to the same models give the same bytes, up to rounding of the device: no time and no host stands in
it. It is sealed like `patch.json`, and its arithmetic can be done again by anyone who reads it.
"""

import importlib.resources
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fastjsonschema

from portllm.certifying.bounds import change_interval, upper_bound
from portllm.errors import CertificateError
from portllm.files.json_file import read_json
from portllm.files.seal import render_sealed, seal_problem
from portllm.notebook import ShownInNotebook
from portllm.patch.record import ModelIdentity, identity_from_json, identity_to_json

CERTIFICATE_FILE = "certificate.json"
FORMAT = 1

ASSUMES = (
    "The inputs are independent draws from those that the port will be given, made before any answer was seen; the "
    "score is the share of right answers."
)
"""What the bound holds for; stands in every certificate, and wherever one is shown."""

COUNTED = ("specialist_right", "ported_right", "negative_flips", "positive_flips")
"""What of `LabelCounts` are whole numbers; JSON has one kind of number for all."""

SAME_NUMBER = 1e-9
"""Bounds by other versions of the mathematics library differ by less than a millionth of this."""


@dataclass(frozen=True, slots=True)
class PatchFiles:
    """An adapter by content: the blake3 digest of each of its files, and its name for people."""

    name: str
    files: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two models that were asked: a checkpoint, and the patch on it unless that is in its weights."""

    model: ModelIdentity
    patch: PatchFiles | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What was asked.

    Attributes:
        digest: Of all bytes of the file.
        rows: Of that file.
        prompt: Template of the prompts.
        completion: Field of the right answer, or None where there are no right answers.
        sample: How many rows were drawn, or None for all.
        seed: Of the drawing, or None.
        repeated: Prompts that had been asked before.
        cut: Prompts that were too long and lost their beginning.
    """

    digest: str
    rows: int
    prompt: str
    completion: str | None
    sample: int | None
    seed: int | None
    repeated: int
    cut: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRule:
    """What counts as an answer; as in `portllm.evaluating.answers.Questions`.

    Attributes:
        kind: `choices`, `exact` or `free`.
        choices: All possible answers, for `choices`.
        choices_from: `given`, or `labels` where they were taken from the rows themselves.
        one_line: A written answer ends with its first line.
        max_tokens: Most tokens of a row.
        max_new_tokens: Most tokens written.
        batch_size: Rows of a forward pass.
    """

    kind: str
    choices: tuple[str, ...]
    choices_from: str | None
    one_line: bool
    max_tokens: int
    max_new_tokens: int
    batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelCounts:
    """What right answers add.

    Attributes:
        specialist_right: Right answers of the old specialist.
        ported_right: Right answers of the ported model.
        negative_flips: Inputs that turned wrong.
        positive_flips: Inputs that turned right.
        bound: `u(negative_flips, n)`, never above the bound from answers that differ.
        change_low: Lower end of the interval of the change of the score.
        change_high: Upper end.
    """

    specialist_right: int
    ported_right: int
    negative_flips: int
    positive_flips: int
    bound: float
    change_low: float
    change_high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """For free text: tokens that the specialist wrote, those that the ported model would, inputs that are all alike."""

    written: int
    same: int
    inputs_same: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate(ShownInNotebook):
    """A bound on the accuracy that a port can have lost.

    Attributes:
        program: Version of PortLLM that asked.
        specialist: The base and the patch that was made on it.
        ported: The evolved model and the ported patch, or the merged model.
        inputs: The inputs.
        answers: What counts as an answer.
        confidence: Confidence of the bound and of the interval, separately.
        n: Number of inputs.
        differing: Rows of the file, from 1, whose answers differ; None for free text.
        bound: `u(k, n)`: the score has fallen by no more than this; None for free text.
        wanted: The requested bound, or None.
        labels: Results that need correct answers, if the inputs have them.
        tokens: For free text, the agreement token by token, from which no bound follows.
        device: `cpu` or `cuda`.
    """

    program: str
    specialist: Side
    ported: Side
    inputs: Inputs
    answers: AnswerRule
    confidence: float
    n: int
    differing: tuple[int, ...] | None
    bound: float | None
    wanted: float | None
    labels: LabelCounts | None
    tokens: TokenCounts | None
    device: str

    def __repr__(self) -> str:
        return f"Certificate(loss_bound={self.loss_bound}, confidence={self.confidence}, n={self.n}, met={self.met})"

    @property
    def loss_bound(self) -> float | None:
        """The tightest bound: from negative flips if there are correct answers, otherwise from answers that differ.

        The former is never the larger one, so nothing is picked after looking.
        """
        return self.bound if self.labels is None else self.labels.bound

    @property
    def met(self) -> bool | None:
        """Whether the bound is as small as requested; None if none was requested."""
        if self.wanted is None or self.loss_bound is None:
            return None
        return self.loss_bound <= self.wanted


def count_labels(n_negative: int, n_positive: int, n_right: int, n: int, *, confidence: float) -> LabelCounts:
    """What right answers add.

    Args:
        n_negative: Inputs that turned wrong.
        n_positive: Inputs that turned right.
        n_right: Right answers of the old specialist.
        n: Inputs.
        confidence: Of the bound and the interval.
    """
    low, high = change_interval(n_negative, n_positive, n, confidence=confidence)
    return LabelCounts(
        specialist_right=n_right,
        ported_right=n_right - n_negative + n_positive,
        negative_flips=n_negative,
        positive_flips=n_positive,
        bound=upper_bound(n_negative, n, confidence=confidence),
        change_low=low,
        change_high=high,
    )


def certificate_to_json(certificate: Certificate) -> dict[str, object]:
    """The certificate as JSON values; `certificate_from_json` is its inverse."""
    differing = certificate.differing
    return {
        "format": FORMAT,
        "program": certificate.program,
        "assumes": ASSUMES,
        "specialist": _side_to_json(certificate.specialist),
        "ported": _side_to_json(certificate.ported),
        "inputs": asdict(certificate.inputs),
        "answers": {**asdict(certificate.answers), "choices": list(certificate.answers.choices)},
        "confidence": certificate.confidence,
        "n": certificate.n,
        "k": None if differing is None else len(differing),
        "differing": None if differing is None else list(differing),
        "bound": certificate.bound,
        "wanted": certificate.wanted,
        "labels": None if certificate.labels is None else asdict(certificate.labels),
        "tokens": None if certificate.tokens is None else asdict(certificate.tokens),
        "device": certificate.device,
    }


def certificate_from_json(values: Mapping[str, Any], *, where: str) -> Certificate:
    """The certificate that the values of a `certificate.json` stand for, whatever its seal and its arithmetic.

    Raises:
        CertificateError: They break the schema.
    """
    try:
        _validator()(dict(values))
        _check_count(values["k"], values["differing"])
    except (fastjsonschema.JsonSchemaValueException, ValueError) as error:
        raise CertificateError(
            f"'{where}': {error}. It was written by another version or edited by hand; certify again."
        ) from error
    answers, differing, labels, tokens = (values[key] for key in ("answers", "differing", "labels", "tokens"))
    return Certificate(
        program=values["program"],
        specialist=_side_from_json(values["specialist"]),
        ported=_side_from_json(values["ported"]),
        inputs=Inputs(**values["inputs"]),
        answers=AnswerRule(**{**answers, "choices": tuple(answers["choices"])}),
        confidence=values["confidence"],
        n=int(values["n"]),
        differing=None if differing is None else tuple(differing),
        bound=values["bound"],
        wanted=values["wanted"],
        labels=None if labels is None else LabelCounts(**{**labels, **{key: int(labels[key]) for key in COUNTED}}),
        tokens=None if tokens is None else TokenCounts(**tokens),
        device=values["device"],
    )


def read_certificate(folder: str | Path) -> Certificate:
    """Read the certificate in a folder; schema, seal and arithmetic are checked.

    Raises:
        CertificateError: The file is missing or damaged, or says what cannot be.
    """
    file = Path(folder) / CERTIFICATE_FILE
    values = read_json(file, error=CertificateError)
    certificate = certificate_from_json(values, where=str(file))
    problems = [problem for problem in (seal_problem(values), *arithmetic_problems(certificate)) if problem]
    if problems:
        raise CertificateError(f"'{file}': {'; '.join(problems)}. Download it again, or certify again.")
    return certificate


def write_certificate(folder: Path, certificate: Certificate) -> None:
    """Write `certificate.json`, sealed."""
    text = render_sealed(certificate_to_json(certificate))
    (folder / CERTIFICATE_FILE).write_text(text, encoding="utf-8")


def arithmetic_problems(certificate: Certificate) -> Iterator[str]:
    """What in a certificate does not follow from what it counts; nothing where all of it does."""
    n, rows, sample = certificate.n, certificate.inputs.rows, certificate.inputs.sample
    if n != (rows if sample is None else sample) or n > rows:
        yield f"{n} inputs of {rows} rows were evaluated, which does not match the sample it records"
        return
    if (certificate.answers.kind == "free") != (certificate.differing is None):
        yield f"the counts do not match answers of kind '{certificate.answers.kind}'"
        return
    if certificate.tokens is not None and not _fits_tokens(certificate.tokens, n):
        yield "more tokens or inputs agree than there are"
    if certificate.differing is None:
        if certificate.bound is not None or certificate.labels is not None or certificate.tokens is None:
            yield "a bound is claimed for free text"
        return
    yield from _bound_problems(certificate, certificate.differing)


def _bound_problems(certificate: Certificate, differing: tuple[int, ...]) -> Iterator[str]:
    n, confidence, labels = certificate.n, certificate.confidence, certificate.labels
    if (
        sorted(set(differing)) != list(differing)
        or len(differing) > n
        or max(differing, default=0) > certificate.inputs.rows
    ):
        yield "the differing rows are not distinct rows of the file"
        return
    if certificate.bound is None or not _same(certificate.bound, upper_bound(len(differing), n, confidence=confidence)):
        yield f"the bound does not follow from {len(differing)} of {n} answers that differ"
    if labels is None:
        return
    negative, positive, right = labels.negative_flips, labels.positive_flips, labels.specialist_right
    if negative + positive > len(differing) or negative > right or right + positive > n:
        yield "the flips do not match the differing answers"
        return
    counted = count_labels(negative, positive, right, n, confidence=confidence)
    if not all(map(_same, asdict(labels).values(), asdict(counted).values())):
        yield "the counts of correct answers do not follow from the flips"


def _check_count(k: object, differing: Sequence[object] | None) -> None:
    if k != (None if differing is None else len(differing)):
        raise ValueError("k is not the number of rows that differ")


def _fits_tokens(tokens: TokenCounts, n: int) -> bool:
    return tokens.same <= tokens.written and tokens.inputs_same <= n


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= SAME_NUMBER


def _side_to_json(side: Side) -> dict[str, object]:
    patch = None if side.patch is None else {"name": side.patch.name, "files": dict(sorted(side.patch.files.items()))}
    return {"model": identity_to_json(side.model), "patch": patch}


def _side_from_json(value: Mapping[str, Any]) -> Side:
    patch = value["patch"]
    return Side(
        identity_from_json(value["model"]), None if patch is None else PatchFiles(patch["name"], patch["files"])
    )


@cache
def _validator() -> Callable[[object], object]:
    text = (
        importlib.resources.files("portllm.certifying").joinpath("certificate.schema.json").read_text(encoding="utf-8")
    )
    compiled: Callable[[object], object] = fastjsonschema.compile(json.loads(text))
    return compiled
