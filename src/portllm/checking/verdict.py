"""Decide whether a patch will hold on the evolved model. Pure: measures in, a verdict and its reasons out.

The rules are few and cautious: between a short continuation, where plain addition was seen to hold, and another model,
where it is known to fail, some patches keep all of their gain and others lose it. Up to ten times as far as addition,
ports by align were seen to hold. What lies beyond is uncertain, and the reasons say which threshold decided and who
measured it. An estimate counts with its 95 % interval: it must be on one side with all of it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from portllm.checking.chain import Chain
from portllm.checking.update.config_changes import ConfigChange, Effect
from portllm.checking.update.lineage import Lineage
from portllm.errors import Refusal
from portllm.measures.estimate import DriftEstimate, SampledEstimate
from portllm.measures.overlap import DriftShare
from portllm.measures.thresholds import (
    AGREEMENT,
    ALIGNED_COSINE,
    ALIGNED_DRIFT,
    CONTINUATION_COSINE,
    INDEPENDENT_COSINE,
    KEPT_GAIN,
    OVERLAP_SHARE,
    QUANTIZATION_GAP,
    SHORT_DRIFT,
    Threshold,
)


class Answer(StrEnum):
    """Verdicts, from best to worst."""

    HOLDS = "holds"
    HOLDS_ALIGNED = "holds aligned"
    UNCERTAIN = "uncertain"
    WILL_NOT_HOLD = "will not hold"
    CANNOT_BE_PORTED = "cannot be ported"


ORDER = tuple(Answer)


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that speaks for or against the patch.

    Attributes:
        answer: The best verdict that this leaves possible.
        text: What was found, and what it means.
        threshold: What decided, or None where no number did.
        is_of_input: Whether it speaks against a model or an option that was given, and not against the patch.
    """

    answer: Answer
    text: str
    threshold: Threshold | None = None
    is_of_input: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verdict on a patch, with its reasons.

    Attributes:
        answer: In one word.
        reasons: Why, the gravest first.
        remarks: What to know, though it changes nothing.
    """

    answer: Answer
    reasons: tuple[Reason, ...]
    remarks: tuple[str, ...] = ()

    @property
    def method(self) -> str | None:
        """The port method for the patch, a row of `METHODS`; None where none carries it.

        What addition is not known to carry is for the methods that measure, on prompts, what they keep: where weights
        have nothing in common, for the one that keeps no factor.
        """
        match self.answer:
            case Answer.HOLDS:
                return "add"
            case Answer.HOLDS_ALIGNED:
                return "align"
            case Answer.CANNOT_BE_PORTED:
                return None
            case _ if any(reason.threshold is INDEPENDENT_COSINE for reason in self.reasons):
                return "transport"
            case _:
                return "align"


@dataclass(frozen=True, slots=True)
class Measures:
    """What is known of a patch and an update.

    Attributes:
        refusals: Why the patch cannot be ported at all.
        is_alignable: Whether align takes the patch to such a model, and is known to: it is of LoRA deltas alone.
        lineage: Of the matrices that the patch changes, by kind of module.
        drift: Of these matrices; None where none could be compared.
        broken: Tensors that hold an infinity or NaN.
        config_changes: What the update changed in `config.json`.
        alignment: Cosine of patch and drift.
        overlaps: By side (`input`, `output`), how much of the drift lies where the patch works.
        kept_gain: By storage dtype, the share of the patch that a merge would keep.
        stored_as: The dtype that the evolved model stores what the patch changes in.
        changes_vocabulary: Whether the patch changes rows that stand for tokens, and tokens have moved or are gone.
        fitted_to: How the weights that the patch was fitted to are quantized (QLoRA); None where they are not.
        quantization_gap: `|W - dequant(quant(W))| / |Δ|` of them; None where it was not measured.
        same_in: The dtype in which base and evolved model are the same numbers; None where more than that differs.
        chain: The way of a patch that was ported before; None for one that was not.
        nothing: Why the patch changes nothing; None where it does.
    """

    refusals: tuple[Refusal, ...] = ()
    is_alignable: bool = True
    lineage: Mapping[str, Lineage] | None = None
    drift: DriftEstimate | None = None
    broken: tuple[str, ...] = ()
    config_changes: tuple[ConfigChange, ...] = ()
    alignment: float | None = None
    overlaps: Mapping[str, DriftShare] | None = None
    kept_gain: Mapping[str, float] | None = None
    stored_as: str | None = None
    changes_vocabulary: bool = False
    fitted_to: str | None = None
    quantization_gap: float | None = None
    same_in: str | None = None
    chain: Chain | None = None
    nothing: str | None = None


def judge(measures: Measures) -> Verdict:
    """The verdict that follows from these measures.

    Example:
        >>> verdict = judge(Measures(refusals=(Refusal("lm_head", "the evolved model has no such module."),)))
        >>> print(verdict.answer, "-", verdict.reasons[0].text)
        cannot be ported - lm_head: the evolved model has no such module.
    """
    return _verdict(_reasons(measures), tuple(_remarks(measures)))


def with_answers(verdict: Verdict, *, agreement: float, n_prompts: int) -> Verdict:
    """The verdict that follows when prompts were run: they can put addition in doubt, and take no doubt away.

    That answers begin alike says nothing of how they go on, and nothing of answers that should be other ones now.

    Args:
        verdict: From weights.
        agreement: Share of prompts to which ported model and old specialist give the same likeliest token.
        n_prompts: How many there were.

    Example:
        >>> verdict = Verdict(Answer.HOLDS, (Reason(Answer.HOLDS, "the weights hardly moved."),))
        >>> with_answers(verdict, agreement=0.52, n_prompts=64).reasons[0].text
        "by addition, 52 % of 64 answers begin as the old specialist's do. Measure it: portllm evaluate."
    """
    if agreement >= AGREEMENT.value:
        return verdict
    begun = f"by addition, {_percent(agreement)} of {n_prompts} answers begin as the old specialist's do."
    if verdict.answer is Answer.HOLDS_ALIGNED:
        doubt = Reason(Answer.HOLDS_ALIGNED, begun, AGREEMENT)
    else:
        doubt = Reason(Answer.UNCERTAIN, f"{begun} Measure it: portllm evaluate.", AGREEMENT)
    return _verdict((doubt, *verdict.reasons), verdict.remarks)


def _verdict(found: Iterable[Reason], remarks: tuple[str, ...]) -> Verdict:
    reasons = sorted(found, key=lambda reason: -ORDER.index(reason.answer))
    return Verdict(reasons[0].answer if reasons else Answer.UNCERTAIN, tuple(reasons), remarks)


def _reasons(measures: Measures) -> Iterator[Reason]:
    if measures.refusals:
        for refusal in measures.refusals:
            yield Reason(Answer.CANNOT_BE_PORTED, str(refusal), is_of_input=refusal.is_of_input)
        return
    if measures.nothing is not None:
        yield Reason(Answer.UNCERTAIN, f"there is nothing to hold: {measures.nothing}")
    for name in measures.broken:
        yield Reason(Answer.WILL_NOT_HOLD, f"{name}: contains an infinity or NaN; a training run diverged.")
    yield from _of_lineage(measures)
    yield from _of_chain(measures)
    yield from _of_direction(measures)
    for change in measures.config_changes:
        if change.effect is Effect.FUNCTION:
            yield Reason(Answer.UNCERTAIN, f"{_change(change)}: the same weights compute a different function.")
    if measures.changes_vocabulary:
        yield Reason(
            Answer.UNCERTAIN,
            "tokens have different rows in the evolved model, and the patch changes such rows. They are moved "
            "with their tokens; rows of removed tokens are left out.",
        )

    if measures.quantization_gap is not None and measures.quantization_gap >= QUANTIZATION_GAP.value:
        yield Reason(
            Answer.UNCERTAIN,
            f"{_of_quantization(measures)} Models merged this way have been seen to break: serve the patch as an "
            "adapter on the evolved model, quantized the same way.",
            QUANTIZATION_GAP,
        )


def _of_quantization(measures: Measures) -> str:
    return (
        f"the patch was trained on {measures.fitted_to} weights, and their quantization error, which it never "
        f"saw, is {measures.quantization_gap:.3g} times as large as the patch."
    )


def _of_lineage(measures: Measures) -> Iterator[Reason]:
    drift, lineage = measures.drift, measures.lineage or {}
    if drift is None:
        yield Reason(Answer.UNCERTAIN, "the drift of the weights that the patch changes could not be measured.")
        return
    far = {kind: found for kind, found in lineage.items() if found in (Lineage.INDEPENDENT, Lineage.UNRELATED)}
    if far:
        yield Reason(
            Answer.WILL_NOT_HOLD,
            f"{_listed(far)}: the evolved weights are unrelated to the base's (cosine below "
            f"{INDEPENDENT_COSINE.value:g}), whatever their shapes. Train the patch again on the evolved model; if "
            "that is the same model with its units in another order or basis, portllm port --method transport carries "
            "the patch.",
            INDEPENDENT_COSINE,
        )
        return
    siblings = [kind for kind, found in lineage.items() if found is Lineage.SIBLING]
    if siblings:
        yield Reason(
            Answer.UNCERTAIN,
            f"{_listed(siblings)}: cosine below {CONTINUATION_COSINE.value:g}, so base and evolved share at most "
            "a common ancestor; plain addition loses its gain over long training. Measure it: portllm evaluate.",
            CONTINUATION_COSINE,
        )
    if drift.sums.drift_sq == 0:
        yield Reason(Answer.HOLDS, "the weights that the patch changes are the same as in the base.")
    elif drift.relative.high <= SHORT_DRIFT.value:
        yield Reason(
            Answer.HOLDS,
            f"the weights that the patch changes drifted by {_percent(drift.relative.value)} of their norm, within the "
            f"{_percent(SHORT_DRIFT.value)} over which plain addition is known to hold.",
            SHORT_DRIFT,
        )
    else:
        moved = f"the weights that the patch changes drifted by {_percent(drift.relative.value)} of their norm"
        yield _of_distance(drift.relative, moved, is_alignable=measures.is_alignable)


def _of_distance(drift: SampledEstimate, moved: str, *, is_alignable: bool, better: str | None = None) -> Reason:
    """What follows from how far the weights moved, where addition is not known to carry a patch that far.

    Args:
        drift: How far.
        moved: The same in words.
        is_alignable: As in `Measures`.
        better: The option with which the distance itself is measured, where this is a bound on it.
    """
    limits = [SHORT_DRIFT, ALIGNED_DRIFT] if is_alignable else [SHORT_DRIFT]
    known = f"plain addition is known to hold up to {_percent(SHORT_DRIFT.value)}"
    if is_alignable:
        known += f", a port by align up to {_percent(ALIGNED_DRIFT.value)}"
    if better is None and any(drift.low <= limit.value < drift.high for limit in limits):
        better = "--full"
    if is_alignable and drift.high <= ALIGNED_DRIFT.value:
        told = f" Whether addition holds too, {better} may tell." if better else ""
        return Reason(Answer.HOLDS_ALIGNED, f"{moved}; {known}.{told}", ALIGNED_DRIFT)
    told = f"{better} measures the drift itself." if better else "Measure it: portllm evaluate."
    return Reason(
        Answer.UNCERTAIN,
        f"{moved}; {known}; beyond that, some patches keep their gain and others lose it. {told}",
        limits[-1],
    )


def _of_chain(measures: Measures) -> Iterator[Reason]:
    """What speaks against a patch that was ported before, though this update alone may be short."""
    chain = measures.chain
    if chain is None:
        return
    first, since, bound = chain.trained_on.name, chain.measured, chain.at_most
    moved = f"since {first}, on which it was trained, the weights that the patch changes"
    if since is not None:
        if since.relative.high > SHORT_DRIFT.value:
            far = f"{moved} drifted by {_percent(since.relative.value)} of their norm"
            yield _of_distance(since.relative, far, is_alignable=measures.is_alignable)
    elif bound is None:
        hop = chain.unmeasured[0]
        yield Reason(
            Answer.UNCERTAIN,
            f"how far the weights drifted since {first}, on which it was trained, is not known: the drift from "
            f"{hop.source} to {hop.target} was not measured when it was ported. Measure all of it: --trained-on "
            f"{first}.",
            SHORT_DRIFT,
        )
    elif bound > SHORT_DRIFT.value:
        far = f"{moved} may have drifted by up to {_percent(bound)} of their norm over {len(chain.hops)} updates"
        better = f"--trained-on {first}"
        yield _of_distance(SampledEstimate(bound), far, is_alignable=measures.is_alignable, better=better)


def _of_direction(measures: Measures) -> Iterator[Reason]:
    cosine = measures.alignment
    if cosine is not None and abs(cosine) >= ALIGNED_COSINE.value:
        what = (
            "contains the patch, or similar training; adding it again overshoots" if cosine > 0 else "undoes the patch"
        )
        yield Reason(
            Answer.UNCERTAIN, f"the update moved along the patch (cosine {cosine:.2f}): it {what}.", ALIGNED_COSINE
        )
    for side, share in (measures.overlaps or {}).items():
        if share.excess is not None and share.share is not None and share.excess >= OVERLAP_SHARE.value:
            yield Reason(
                Answer.UNCERTAIN,
                f"{_percent(share.share)} of the drift lies in the {side}s that the patch uses, "
                f"{_percent(share.by_chance or 0.0)} by chance: the update changed what the patch was trained on.",
                OVERLAP_SHARE,
            )


def _remarks(measures: Measures) -> Iterator[str]:
    if measures.same_in is not None:
        yield f"base and evolved model are the same weights in {measures.same_in}: what drifted is rounding alone"
    if measures.chain is not None:
        yield "the patch was ported before; the forecast is for this update alone"
    for change in measures.config_changes:
        if change.effect is not Effect.FUNCTION:
            yield _change(change)
    gap = measures.quantization_gap
    if gap is not None and gap < QUANTIZATION_GAP.value:
        yield _of_quantization(measures).removesuffix(".")
    elif gap is None and measures.fitted_to is not None:
        yield (
            f"the patch was trained on {measures.fitted_to} weights, and their quantization error is not measured "
            "separately; it is part of the drift if the base given is the quantized one"
        )
    kept = (measures.kept_gain or {}).get(measures.stored_as or "")
    if kept is not None and kept < KEPT_GAIN.value:
        wider = next((name for name, gain in (measures.kept_gain or {}).items() if gain >= KEPT_GAIN.value), "F32")
        yield (
            f"merged into {measures.stored_as}, {_percent(kept)} of the patch would survive rounding: serve it as an "
            f"adapter, or merge with --dtype {wider} or --rounding stochastic"
        )


def _change(change: ConfigChange) -> str:
    return f"{change.field} was {_value(change.base)} and is {_value(change.evolved)}"


def _value(value: object) -> str:
    text = "not said" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(kinds: Mapping[str, Lineage] | list[str]) -> str:
    names = list(kinds)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
