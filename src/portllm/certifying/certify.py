"""Bound the accuracy that a port can have lost: two models answer the user's inputs, and differing answers are counted.

Nobody has to say what is right, and no model has to be the better one: a score that counts right answers cannot fall by
more than the share of inputs whose answers differ. See `docs/certify.md` for what is claimed and what is not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from portllm import __version__
from portllm.certifying.bounds import least_inputs, upper_bound
from portllm.certifying.certificate import (
    ASSUMES,
    AnswerRule,
    Certificate,
    LabelCounts,
    PatchFiles,
    Side,
    TokenCounts,
    count_labels,
    write_certificate,
)
from portllm.certifying.inputs import Asked, CertifySettings, Respondent, ask, read_inputs
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.checkpoint.vocabulary import has_same_tokenizer
from portllm.errors import PortLLMError, Refusal, refuse
from portllm.evaluating.decision import points_text
from portllm.evaluating.plan import confused, model_refusals, trained_on
from portllm.files.output_folder import check_apart, check_free, staged_folder
from portllm.files.seal import digest_file
from portllm.files.source import Source
from portllm.matching.added_tokens import added_tokens
from portllm.patch.adapter_folder import CONFIG_FILE, TENSOR_FILE, PatchLike, files_of, folder_of, load_patch
from portllm.patch.identify import identify
from portllm.patch.patch import Patch
from portllm.progress import Progress, silent
from portllm.running.data import Data, chat_template_for
from portllm.running.device import Device
from portllm.running.folder import check_runnable, model_folder
from portllm.tensors.info import TensorInfo

if TYPE_CHECKING:
    from portllm.certifying.agreement import Agreement

TRAINED_ON = "The bound would say nothing about other inputs. Provide inputs that were not used for training."


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifyPlan:
    """Everything that is known before a model is loaded.

    Attributes:
        specialist: The base and its patch, by content.
        ported: The evolved model and the ported patch, or the merged model.
        respondents: The same two as folders to load.
        asked: What to ask.
        settings: As given.
        files: What is read.
    """

    specialist: Side
    ported: Side
    respondents: tuple[Respondent, Respondent]
    asked: Asked
    settings: CertifySettings
    files: tuple[Source, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """An input that the two models answer otherwise, to be read; no certificate holds what was asked.

    Attributes:
        row: Of the file, from 1.
        prompt: What was asked.
        before: What the old specialist answers.
        after: What the ported model answers.
        right: The right answer, where the inputs have them.
    """

    row: int
    prompt: str
    before: str
    after: str
    right: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Which choice each input was given.

    Attributes:
        before: What the old specialist answers.
        after: What the ported model answers.
        right: The right answers, where the inputs have them.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    right: tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Certification:
    """What came of asking.

    Attributes:
        certificate: As it was written.
        disagreements: Its rows that differ, in their order; none for free text, which is compared token by token.
        chosen: All answers, where the models had to choose; the certificate holds none of them.
    """

    certificate: Certificate
    disagreements: tuple[Disagreement, ...]
    chosen: Chosen | None = None


def certify(
    patch: PatchLike,
    *,
    base: ModelLike,
    data: str | Path,
    out: str | Path,
    evolved: ModelLike | None = None,
    ported: PatchLike | None = None,
    merged: ModelLike | None = None,
    settings: CertifySettings | None = None,
    allow_other_base: bool = False,
    device: Device = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Certificate:
    """Compare the answers of the old specialist and the ported model, and write `out/certificate.json`.

    Args:
        patch: The original patch.
        base: Its base.
        data: A data file, with or without right answers.
        out: The certificate's folder.
        evolved: The updated base, unless `merged` is given.
        ported: The patch ported to it.
        merged: The evolved model with the ported patch merged in, instead of these two.
        settings: How answers are computed and what is claimed.
        allow_other_base: Accept a model other than the one a patch was made on.
        device: Device to run on.
        overwrite: Replace `out` if it exists.
        progress: Progress callback (rows).

    Raises:
        PlanRefusedError: A patch does not match its model, or the requested bound needs more rows.
        DataError: Rows are invalid, or are the patch's training data.
        NotFoundError: A model is a single file, without configuration and tokenizer.
        OutputExistsError: `out` exists; raised before any work is done.
    """
    check_free(Path(out), overwrite=overwrite)
    settings, old = settings or CertifySettings(), load_patch(patch)
    rows = read_inputs(Path(data), old, settings)
    plan = plan_certify(
        old,
        base=open_checkpoint(base, progress=progress),
        data=rows,
        evolved=None if evolved is None else open_checkpoint(evolved, progress=progress),
        ported=None if ported is None else load_patch(ported),
        merged=None if merged is None else open_checkpoint(merged, progress=progress),
        settings=settings,
        allow_other_base=allow_other_base,
        progress=progress,
    )
    return run_certify(plan, Path(out), device=device, overwrite=overwrite, progress=progress).certificate


def run_certify(
    plan: CertifyPlan, out: Path, *, device: Device = "auto", overwrite: bool = False, progress: Progress = silent
) -> Certification:
    """Carry out a plan; see `certify`."""
    check_apart(out, plan.files)
    from portllm.certifying.agreement import compare_answers  # loads torch, which no refusal needs
    from portllm.running.model import choose_device

    agreement = compare_answers(*plan.respondents, plan.asked.questions, device=device, progress=progress)
    certificate = conclude(plan, agreement, device=choose_device(device).type)
    with staged_folder(out, overwrite=overwrite, inputs=plan.files) as folder:
        write_certificate(folder, certificate)
    disagreements = tuple(_disagreements(plan.asked, agreement))
    return Certification(certificate=certificate, disagreements=disagreements, chosen=_chosen(plan.asked, agreement))


def plan_certify(
    patch: Patch[TensorInfo],
    *,
    base: Checkpoint,
    data: Data,
    evolved: Checkpoint | None = None,
    ported: Patch[TensorInfo] | None = None,
    merged: Checkpoint | None = None,
    settings: CertifySettings | None = None,
    allow_other_base: bool = False,
    progress: Progress = silent,
) -> CertifyPlan:
    """What `certify` would do, every reason not to checked; arguments and errors as there."""
    settings = settings or CertifySettings()
    if (merged is None) == (evolved is None) or (evolved is None) != (ported is None):
        raise PortLLMError("the ported model: pass either the evolved model and the ported patch, or a merged model.")
    successor = merged if evolved is None else evolved
    if successor is None:
        raise AssertionError("one of the two is given")
    specialist = Side(identify(base), _files(patch))
    after = Side(identify(successor), None if ported is None else _files(ported))
    if not allow_other_base:
        refuse(confused(patch, () if ported is None else (ported,), specialist.model, after.model))
    for model in (base, successor):
        check_runnable(model)
    refusals = list(
        model_refusals("--patch", patch, base, specialist.model, evolved=after.model, allow_other_base=allow_other_base)
    )
    if ported is not None:
        refusals += model_refusals("--ported", ported, successor, after.model, allow_other_base=allow_other_base)
    refusals += _too_few(settings.sample or len(data.rows), settings)
    tokens = added_tokens(patch, base)
    is_alike = not tokens or (ported is not None and tokens == added_tokens(ported, successor))
    if settings.kind == "free" and not (is_alike and has_same_tokenizer(base, successor)):
        reason = "the two models have different tokenizers, so their tokens cannot be compared. Use --answers exact."
        refusals.append(Refusal("--answers free", reason))
    refusals += trained_on(data.digest, patch, ported, consequence=TRAINED_ON)
    refuse(refusals)
    folder = model_folder(base, progress=progress)
    template = chat_template_for(data, patch, folder=folder)
    return CertifyPlan(
        specialist=specialist,
        ported=after,
        respondents=(
            Respondent("base + patch", folder, folder_of(patch)),
            Respondent(
                "merged" if ported is None else "evolved + ported",
                model_folder(successor, progress=progress),
                None if ported is None else folder_of(ported),
            ),
        ),
        asked=ask(data, folder, template, settings),
        settings=settings,
        files=(
            data.file,
            *base.files,
            *successor.files,
            *files_of(patch),
            *(() if ported is None else files_of(ported)),
        ),
    )


def conclude(plan: CertifyPlan, agreement: "Agreement", *, device: str) -> Certificate:
    """What follows from the answers."""
    asked, confidence = plan.asked, plan.settings.confidence
    n, questions = len(asked.rows), asked.questions
    differing = agreement.differing
    bound = None if differing is None else upper_bound(len(differing), n, confidence=confidence)
    from_labels = questions.kind == "choices" and not plan.settings.choices
    return Certificate(
        program=__version__,
        assumes=ASSUMES,
        specialist=plan.specialist,
        ported=plan.ported,
        inputs=structs.replace(asked.inputs, cut=agreement.first.n_cut_rows),
        answers=AnswerRule(
            kind=questions.kind,
            choices=questions.choices,
            choices_from=None if questions.kind != "choices" else "labels" if from_labels else "given",
            one_line=questions.one_line,
            max_tokens=questions.max_tokens,
            max_new_tokens=questions.max_new_tokens,
            batch_size=questions.batch_size,
        ),
        confidence=confidence,
        n=n,
        k=None if differing is None else len(differing),
        differing=None if differing is None else tuple(asked.rows[index] for index in differing),
        bound=bound,
        wanted=plan.settings.wanted,
        labels=_labels(plan, agreement),
        tokens=_tokens(agreement),
        device=device,
    )


def _disagreements(asked: Asked, agreement: "Agreement") -> Iterator[Disagreement]:
    if agreement.second is None or agreement.differing is None:
        return
    for index in agreement.differing:
        yield Disagreement(
            row=asked.rows[index],
            prompt=asked.questions.prompts[index],
            before=agreement.first.texts[index],
            after=agreement.second.texts[index],
            right=None if asked.completions is None else asked.completions[index],
        )


def _chosen(asked: Asked, agreement: "Agreement") -> Chosen | None:
    if agreement.second is None or asked.questions.kind != "choices":
        return None
    right = None if asked.completions is None else tuple(asked.completions)
    return Chosen(before=tuple(agreement.first.texts), after=tuple(agreement.second.texts), right=right)


def _too_few(n: int, settings: CertifySettings) -> Iterator[Refusal]:
    if settings.wanted is None or upper_bound(0, n, confidence=settings.confidence) <= settings.wanted:
        return
    least = least_inputs(0, settings.wanted, confidence=settings.confidence)
    yield Refusal(
        f"--max-loss {100 * settings.wanted:g}",
        f"a bound of {points_text(settings.wanted)} (--bound {settings.wanted:g}) cannot be met with {n} inputs, even "
        f"if all answers agree: it takes {least}. Provide more inputs, or a higher limit.",
    )


def _files(patch: Patch[TensorInfo]) -> PatchFiles:
    folder = folder_of(patch)
    return PatchFiles(patch.name, {name: digest_file(folder / name) for name in (CONFIG_FILE, TENSOR_FILE)})


def _labels(plan: CertifyPlan, agreement: "Agreement") -> LabelCounts | None:
    completions = plan.asked.completions
    if completions is None or agreement.second is None:
        return None
    pairs = zip(agreement.first.texts, agreement.second.texts, completions, strict=True)
    sides = [(was == right, now == right) for was, now, right in pairs]
    return count_labels(
        sides.count((True, False)),
        sides.count((False, True)),
        sum(was for was, _ in sides),
        len(sides),
        confidence=plan.settings.confidence,
    )


def _tokens(agreement: "Agreement") -> TokenCounts | None:
    if agreement.same_tokens is None:
        return None
    lengths = list(map(len, agreement.first.tokens))
    return TokenCounts(
        written=sum(lengths),
        same=sum(agreement.same_tokens),
        inputs_same=sum(map(int.__eq__, agreement.same_tokens, lengths)),
    )
