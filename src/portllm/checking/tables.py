"""What `check` found as tables, for the terminal and the page alike. Pure."""

import math
from collections.abc import Iterable

import numpy as np

from portllm.checking.chain import Chain
from portllm.checking.forecast_model import Expected, Shipped
from portllm.checking.outcomes import ENOUGH, HALF, Seen
from portllm.checking.report import CheckReport, PatchReport
from portllm.checking.update.report import UpdateReport
from portllm.measures.estimate import SampledEstimate
from portllm.show.numbers import counted, n_params, percent, three_digits, three_percent

MOST = percent(ENOUGH, digits=0)
"""What counts as most of the gain."""

SHOWN = 3
"""Names of tensors that are shown of each kind; JSON has all."""

Rows = list[tuple[str, ...]]
"""The first row names the columns."""


def verdict_counts(report: CheckReport) -> str:
    """How many patches have which verdict."""
    counts: dict[str, int] = {}
    for patch in report.patches:
        counts[str(patch.verdict.answer)] = counts.get(str(patch.verdict.answer), 0) + 1
    total = ", ".join(f"{count} {answer}" for answer, count in counts.items())
    return f"{len(report.patches)} patches on {report.update.evolved.name}: {total}"


def patch_rows(report: CheckReport) -> Rows:
    """A line for each patch."""
    rows: Rows = [("verdict", "patch", "forecast", "size", "drift", "cosine", "kept", "why")]
    for patch in report.patches:
        expected = patch.forecast
        kept = patch.rounding.get(patch.stored_as or "")
        rows.append(
            (
                str(patch.verdict.answer),
                patch.name,
                "" if expected is None else _whole(min(said.retention for said in expected.forecasts.values())),
                three_percent(patch.relative_size),
                "" if patch.drift is None else three_percent(patch.drift.relative.value),
                "" if patch.alignment.cosine is None else f"{patch.alignment.cosine:.3f}",
                "" if kept is None else percent(kept.kept_gain),
                patch.verdict.reasons[0].text if patch.verdict.reasons else "",
            )
        )
    return rows


WAYS = {
    None: "none",
    "add": "add",
    "align": "align, which fits it on unlabeled prompts and measures what it keeps (docs/methods/align.md)",
    "transport": "transport, if it is the same model with other units: it measures what it keeps "
    "(docs/methods/transport.md)",
}


def patch_facts(patch: PatchReport) -> dict[str, str]:
    """What was measured of one patch; nothing where it cannot be ported."""
    if not patch.changes:
        return {}
    against = patch.size_against_drift
    rows = {
        "method": WAYS[patch.verdict.method],
        "size": f"{three_percent(patch.relative_size)} of the norm of the weights it changes"
        + ("" if against is None else f", {three_digits(against)} times their drift"),
    }
    if patch.forecast is not None:
        rows["forecast"] = _forecast(patch.forecast)
    if patch.n_rescaled:
        rows["size"] += f"; excluding DoRA's rescaling in {patch.n_rescaled} modules"
    if patch.chain is not None:
        rows["since training"] = _since(patch.chain)
    if patch.alignment.cosine is not None:
        rows["direction"] = f"cosine {patch.alignment.cosine:.4f} between patch and drift"
    for side, share in patch.overlaps.items():
        if share.share is not None and share.by_chance is not None:
            rows[f"drift in {side}s"] = (
                f"{three_percent(share.share)} of the drift lies in the {side} directions that the patch uses, "
                f"{three_percent(share.by_chance)} would by chance"
            )
    if patch.rounding:
        kept = (f"{dtype} {percent(sums.kept_gain)}" for dtype, sums in patch.rounding.items())
        rows["kept gain"] = f"if merged and stored as {', '.join(kept)}"
    return rows


def _since(chain: Chain) -> str:
    """How far the weights drifted since the base that the patch was trained on."""
    if chain.measured is not None:
        return f"{_with_error(chain.measured.relative)} drift since {chain.trained_on.name}"
    if chain.at_most is None:
        hops = ", ".join(f"{hop.source} to {hop.target}" for hop in chain.unmeasured)
        return f"unknown drift since {chain.trained_on.name}: not measured from {hops}"
    drifts = ", ".join(three_percent(hop.drift) for hop in chain.hops)
    return f"at most {three_percent(chain.at_most)} drift since {chain.trained_on.name}, update by update: {drifts}"


def _forecast(expected: Expected) -> str:
    fitted = expected.shipped
    parts = (
        f"{_whole(said.retention)} [{_whole(said.low)}, {_whole(said.high)}] in {target}"
        for target, said in expected.forecasts.items()
    )
    text = (
        f"{', '.join(parts)}: of retraining's gain, with {_whole(expected.confidence)} interval; fitted on "
        f"{fitted.n_cells} patches on {fitted.n_updates} updates of {fitted.base}"
    )
    if expected.outside:
        text += f"; an extrapolation, since these are outside the fitted range: {', '.join(expected.outside)}"
    return text


def _whole(share: float) -> str:
    return percent(share, digits=0)


def update_facts(update: UpdateReport) -> dict[str, str]:
    """What was found of the update."""
    pairing = update.pairing
    rows = {"lineage": str(update.lineage)}
    if update.drift is not None:
        rows["drift"] = f"{_with_error(update.drift.relative)} of the matrices' norm"
        rows["cosine"] = _plain_with_error(update.drift.cosine)
    rows["read"] = (
        f"every weight of both models, {n_params(update.n_elements)} each"
        if update.is_full
        else f"{n_params(update.n_elements)} weights of each model, sampled from all tensors; --full reads all"
    )
    rows["tensors"] = f"{len(pairing.pairs)} compared" + "".join(
        f"; {len(names)} {what} ({_named(names)})"
        for what, names in (
            ("only in the base", pairing.removed),
            ("only in the evolved model", pairing.added),
            ("with a different shape", pairing.reshaped),
            ("with a different number of rows", pairing.grown),
            ("not numeric", pairing.no_numbers),
            ("not finite", update.broken),
        )
        if names
    )
    rows["vocabulary"] = _vocabulary(update)
    if update.config_changes:
        rows["config.json"] = "; ".join(f"{c.field} {c.base} to {c.evolved}" for c in update.config_changes)
    return rows


def kind_rows(update: UpdateReport) -> Rows:
    """A line for each kind of module."""
    several = any(found.lineage != update.lineage for found in update.kinds.values())
    rows: Rows = [("module", "tensors", "drift", "least", "most", "cosine", *("lineage",) * several)]
    for kind, found in update.kinds.items():
        cells = [cell.relative.value for place, cell in update.cells.items() if place.kind == kind]
        rows.append(
            (
                kind,
                str(found.n_tensors),
                _with_error(found.drift.relative),
                three_percent(min(cells)),
                three_percent(max(cells)),
                f"{found.drift.cosine.value:.5f}",
                *(str(found.lineage),) * several,
            )
        )
    return rows


def layer_rows(update: UpdateReport) -> Rows:
    """A line for each layer, a column for each kind of module."""
    inside = {place: cell for place, cell in update.cells.items() if place.layer >= 0}
    kinds = sorted({place.kind for place in inside if place.is_matrix})
    stacks = sorted({(place.stack, place.layer) for place in inside})
    found = {(place.stack, place.layer, place.kind): cell for place, cell in inside.items()}
    rows: Rows = [("layer", *kinds)]
    for stack, layer in stacks:
        cells = (found.get((stack, layer, kind)) for kind in kinds)
        rows.append(
            (f"{stack}.{layer}", *("" if cell is None else three_percent(cell.relative.value) for cell in cells))
        )
    return rows


def _vocabulary(update: UpdateReport) -> str:
    if update.tokens is not None:
        return f"{update.tokens.n_moved} tokens moved to other rows, {len(update.tokens.gone)} were removed"
    return (
        "the same tokens in the same rows"
        if update.has_vocabularies
        else "not compared: one of the models has no tokenizer.json"
    )


def _with_error(estimate: SampledEstimate) -> str:
    if estimate.error <= abs(estimate.value) / 2000:  # below the last digit that is shown
        return three_percent(estimate.value)
    error = "?" if math.isinf(estimate.error) else f"{100 * estimate.error:.1g}"
    return f"{three_digits(100 * estimate.value)} ± {error} %"


def _plain_with_error(estimate: SampledEstimate) -> str:
    return f"{estimate.value:.6f}" + (f" ± {estimate.error:.1g}" if estimate.error else "")


def _named(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def seen_text(seen: Seen) -> str:
    """The same in words.

    Example:
        >>> seen_text(Seen(16, kept=12, lost=1)), seen_text(Seen(0, 0, 0))
        ('12 of 16 patches on like updates kept 90 % of the gain', 'No patch on a like update was measured')
    """
    if not seen.n:
        return "No patch on a like update was measured"
    return f"{seen.kept} of {counted(seen.n, 'patch', 'patches')} on like updates kept {MOST} of the gain"


def outcome_rows(shipped: Shipped, target: str) -> list[tuple[str, ...]]:
    """All outcomes by power of ten of the drift; the first row names the columns."""
    found: dict[int, list[float]] = {}
    for outcome in sorted(shipped.outcomes, key=lambda one: one.drift):
        if target in outcome.retention and outcome.drift > 0:
            found.setdefault(math.floor(math.log10(outcome.drift)), []).append(outcome.retention[target])
    return [
        ("drift", "patches", f"kept {MOST} or more", "kept less than half", "median kept"),
        *(
            (
                f"{100 * 10.0**power:g} % to {100 * 10.0 ** (power + 1):g} %",
                str(len(kept)),
                str(sum(share >= ENOUGH for share in kept)),
                str(sum(share < HALF for share in kept)),
                percent(float(np.median(kept)), digits=0),
            )
            for power, kept in found.items()
        ),
    ]
