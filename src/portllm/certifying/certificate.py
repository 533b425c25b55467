"""The certificate of a port: `certificate.json` records the inputs, the answers that differ and the resulting bound.

The same questions to the same models give the same bytes, up to rounding of the device: no time and no host stands in
it. It is sealed like `patch.json`, and its arithmetic can be done again by anyone who reads it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, TypeAlias

from msgspec import Meta, structs

from portllm.certifying.bounds import change_interval, upper_bound
from portllm.errors import CertificateError
from portllm.files.json_file import read_json
from portllm.files.record import NamedBlake3, Recorded, decode_sealed, one_of, write_sealed
from portllm.files.seal import seal_problem
from portllm.notebook import ShownInNotebook
from portllm.patch.record import ModelIdentity, PatchFileDigests

CERTIFICATE_FILE = "certificate.json"
FORMAT = 1

ASSUMES = (
    "The bound holds if the inputs are independent draws from those that the port will be given, made before any "
    "answer was seen; the score is the share of right answers."
)
"""What the bound holds for; stands in every certificate, and wherever one is shown."""

SAME_NUMBER = 1e-9
"""Bounds by other versions of the mathematics library differ by less than a millionth of this."""

MOST_ROWS = 1_000_000_000

Count: TypeAlias = Annotated[int, Meta(ge=0, description="an integer, 0 or more")]
Positive: TypeAlias = Annotated[int, Meta(ge=1, description="an integer, 1 or more")]
Rows: TypeAlias = Annotated[int, Meta(ge=1, le=MOST_ROWS, description=f"an integer from 1 to {MOST_ROWS}")]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1")]
Change: TypeAlias = Annotated[float, Meta(ge=-1, le=1, description="a number from -1 to 1")]
Wanted: TypeAlias = Annotated[float, Meta(gt=0, lt=1, description="a number between 0 and 1")]
Confidence: TypeAlias = Annotated[float, Meta(gt=0, le=0.999999999, description="a number between 0 and 1")]


class PatchFiles(Recorded, frozen=True):
    """An adapter by content: the blake3 digest of each of its files, and its name for people."""

    name: str
    files: PatchFileDigests


class Side(Recorded, frozen=True):
    """One of the two models that were asked: a checkpoint, and the patch on it unless that is in its weights."""

    model: ModelIdentity
    patch: PatchFiles | None


class Inputs(Recorded, frozen=True, kw_only=True):
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
        chat_template: Digest of the chat template that made prompts of messages, or None.
    """

    digest: NamedBlake3
    rows: Rows
    prompt: str
    completion: str | None
    sample: Positive | None
    seed: int | None
    repeated: Count
    cut: Count
    chat_template: NamedBlake3 | None = None


class AnswerRule(Recorded, frozen=True, kw_only=True):
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

    kind: Annotated[str, one_of("choices", "exact", "free")]
    choices: tuple[str, ...]
    choices_from: Annotated[str, one_of("given", "labels")] | None
    one_line: bool
    max_tokens: Positive
    max_new_tokens: Positive
    batch_size: Positive


class LabelCounts(Recorded, frozen=True, kw_only=True):
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

    specialist_right: Count
    ported_right: Count
    negative_flips: Count
    positive_flips: Count
    bound: Share
    change_low: Change
    change_high: Change


class TokenCounts(Recorded, frozen=True, kw_only=True):
    """For free text: tokens that the specialist wrote, those that the ported model would, inputs that are all alike."""

    written: Positive
    same: Count
    inputs_same: Count


class Certificate(Recorded, ShownInNotebook, frozen=True, kw_only=True, tag_field="format", tag=FORMAT):
    """A bound on the accuracy that a port can have lost.

    Attributes:
        program: Version of PortLLM that asked.
        assumes: What the bound holds for: `ASSUMES`.
        specialist: The base and the patch that was made on it.
        ported: The evolved model and the ported patch, or the merged model.
        inputs: The inputs.
        answers: What counts as an answer.
        confidence: Confidence of the bound and of the interval, separately.
        n: Number of inputs.
        k: Inputs that are answered otherwise; None for free text.
        differing: Which rows of the file these are, from 1.
        bound: `u(k, n)`: the score has fallen by no more than this; None for free text.
        wanted: The requested bound, or None.
        labels: Results that need correct answers, if the inputs have them.
        tokens: For free text, the agreement token by token, from which no bound follows.
        device: `cpu` or `cuda`.
    """

    program: str
    assumes: str
    specialist: Side
    ported: Side
    inputs: Inputs
    answers: AnswerRule
    confidence: Confidence
    n: Rows
    k: Count | None
    differing: tuple[Positive, ...] | None
    bound: Share | None
    wanted: Wanted | None
    labels: LabelCounts | None
    tokens: TokenCounts | None
    device: Annotated[str, one_of("cpu", "cuda")]

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


def parse_certificate(values: Mapping[str, object], *, where: str) -> Certificate:
    """The certificate that the values of a `certificate.json` stand for, whatever its seal and its arithmetic.

    Raises:
        CertificateError: They do not fit.
    """
    try:
        return decode_sealed(Certificate, values)
    except ValueError as error:
        raise CertificateError(
            f"'{where}': {error}. It was written by another version or edited by hand; certify again."
        ) from error


def read_certificate(folder: str | Path) -> Certificate:
    """Read the certificate in a folder; schema, seal and arithmetic are checked.

    Raises:
        CertificateError: The file is missing or damaged, or says what cannot be.
    """
    file = Path(folder) / CERTIFICATE_FILE
    values = read_json(file, error=CertificateError)
    certificate = parse_certificate(values, where=str(file))
    problems = [problem for problem in (seal_problem(values), *arithmetic_problems(certificate)) if problem]
    if problems:
        raise CertificateError(f"'{file}': {'; '.join(problems)}. Download it again, or certify again.")
    return certificate


def write_certificate(folder: Path, certificate: Certificate) -> None:
    """Write `certificate.json`, sealed."""
    write_sealed(folder / CERTIFICATE_FILE, certificate)


def arithmetic_problems(certificate: Certificate) -> Iterator[str]:
    """What in a certificate does not follow from what it counts; nothing where all of it does."""
    n, rows, sample = certificate.n, certificate.inputs.rows, certificate.inputs.sample
    if certificate.k != (None if certificate.differing is None else len(certificate.differing)):
        yield "k is not the number of rows that differ"
        return
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
    if not all(map(_same, structs.astuple(labels), structs.astuple(counted))):
        yield "the counts of correct answers do not follow from the flips"


def _fits_tokens(tokens: TokenCounts, n: int) -> bool:
    return tokens.same <= tokens.written and tokens.inputs_same <= n


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= SAME_NUMBER
