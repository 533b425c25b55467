"""The page of `check`: will each patch hold, why, where the update and the patch changed the model. Pure."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median

from portllm.checking.decision import TONES, Checked, decide, decide_all
from portllm.checking.delta.places import PlacedDelta
from portllm.checking.forecast_model import Expected, Forecast
from portllm.checking.outcomes import ABOUT, seen_about
from portllm.checking.prompts.tables import text_facts, text_notes, text_title
from portllm.checking.report import CheckReport, PatchReport
from portllm.checking.tables import Rows, kind_rows, outcome_rows, patch_facts, patch_rows, seen_text, update_facts
from portllm.checking.update.config_changes import Effect
from portllm.checking.update.report import UpdateReport
from portllm.measures.places import TensorPlace
from portllm.measures.thresholds import KEPT_GAIN, SHORT_DRIFT
from portllm.show.headline import Tone
from portllm.show.html.bars import Row, bars
from portllm.show.html.figure import facts, figure, figures, folded, side_by_side, table
from portllm.show.html.heatmap import cell_rows, heatmap, kinds_of, layers_of, stacks_of
from portllm.show.html.lines import Curve, Point, lines
from portllm.show.html.markup import Html, element, joined
from portllm.show.html.page import Tile, banner, bullets, document, fragment, paragraph, section
from portllm.show.html.scatter import Here, scatter
from portllm.show.names import patch_name, short_name
from portllm.show.numbers import counted, percent, three_percent

EFFECTS: Mapping[Effect, str] = {
    Effect.SHAPE: "weights change shape",
    Effect.FUNCTION: "the same weights compute a different function",
    Effect.POSITION: "attention encodes positions differently",
    Effect.VOCABULARY: "rows of the embedding and the head differ",
}


def check_page(
    report: CheckReport,
    failed: Sequence[tuple[str, str]] = (),
    *,
    checked: Checked | None = None,
    about: Mapping[str, str] | None = None,
) -> str:
    """The page of one patch, or of several: then a table comes first, and each has a section of its own.

    Args:
        report: What `check` found, with `places`.
        failed: Patches that could not be opened, and why.
        checked: What the user calls the models, for the command that comes next.
        about: What else is said at the top, such as the day.
    """
    update = report.update
    base, evolved = short_name(update.base.name), short_name(update.evolved.name)
    told = {"base": base, "updated base": evolved, "read": "every weight" if update.is_full else "samples"}
    if len(report.patches) == 1 and not failed:
        patch = report.patches[0]
        name = patch_name(patch.name)
        return document(
            f"{name} from {base} to {evolved}",
            decide(patch, update.evolved.name, checked=checked, thresholds=True),
            [_patch(patch, beside=_drift_figures(update)), *_update(update)],
            about={"patch": name} | told | dict(about or {}),
            tiles=list(_tiles(patch)),
        )
    wrong = [f"{name}: {error}" for name, error in failed]
    headline = replace(decide_all(report, failed=bool(wrong)), reasons=wrong)
    parts = [
        table(_linked(patch_rows(report)), label="All patches", wide={1, 7}),
        section("The update", figures(*_drift_figures(update)), *_update(update)),
        *(
            element(
                "section",
                banner(decide(patch, update.evolved.name, checked=checked, thresholds=True), heading="h2"),
                _patch(patch, beside=()),
                id=f"patch-{number}",
            )
            for number, patch in enumerate(report.patches, start=1)
        ),
    ]
    told = {"patches": str(len(report.patches))} | told | dict(about or {})
    return document(f"Patches from {base} to {evolved}", headline, parts, about=told)


def notebook(report: CheckReport) -> str:
    """What a notebook shows: the table of all patches."""
    return fragment(decide_all(report), table(patch_rows(report), label="All patches"))


def _linked(rows: Rows) -> Rows:
    """The table of all patches, each name a link to its section."""
    head, *patches = rows
    named = (
        (verdict, element("a", name, href=f"#patch-{n}"), *rest) for n, (verdict, name, *rest) in enumerate(patches, 1)
    )
    return [head, *named]


def _patch(patch: PatchReport, *, beside: Sequence[Html]) -> Html:
    """The forecast among outcomes and the pictures of one patch, and its numbers, folded."""
    places = {place: found for place, found in (patch.places or {}).items() if math.isfinite(found.relative_size)}
    pictures = [*_forecast_figure(patch), *_kept_figure(patch), *beside, *_size_figures(patch, places)]
    known = facts(patch_facts(patch))
    parts = [folded("The patch in numbers", known)] if known else []
    if patch.text is not None:
        said = text_facts(patch.text)
        if notes := text_notes([patch.text]):
            said["note"] = "; ".join(notes)
        parts.insert(0, section(f"The patch {text_title(patch.text)}", facts(said), level=3))
    return joined([side_by_side(*pictures), *parts, *_spectra(places)])


def _tiles(patch: PatchReport) -> Iterator[Tile]:
    """The verdict, what is expected, how far the weights moved, what a merge would keep, what prompts say."""
    answer = patch.verdict.answer
    grounds = "by weights alone" if patch.text is None else "by weights and prompts"
    yield Tile("Verdict", str(answer), grounds, TONES[answer])
    if patch.forecast is not None:
        for target, said in _worst_first(patch.forecast)[:1]:
            ends = f"{percent(said.low, digits=0)} to {percent(said.high, digits=0)}"
            detail = (
                f"of retraining's gain in {target}; forecast, {percent(patch.forecast.confidence, digits=0)} interval"
            )
            yield Tile("Expected to keep", percent(said.retention, digits=0), f"{detail} {ends}")
    if patch.drift is not None:
        drift = patch.drift.relative.value
        limit = percent(SHORT_DRIFT.value)
        is_short = drift <= SHORT_DRIFT.value
        tone: Tone = "good" if is_short else "doubt"
        said_of = f"{'within' if is_short else 'beyond'} {limit}"
        yield Tile(
            "The weights moved by", three_percent(drift), "of their norm; addition is known to hold up to there",
            tone, said_of,
        )  # fmt: skip
    kept = patch.rounding.get(patch.stored_as or "")
    if kept is not None:
        enough = kept.kept_gain >= KEPT_GAIN.value
        tone = "good" if enough else "doubt"
        said_of = "enough" if enough else f"below {percent(KEPT_GAIN.value, digits=0)}"
        detail = f"of the patch, if merged and stored as {patch.stored_as}; as an adapter, all of it"
        yield Tile("A merge would keep", percent(kept.kept_gain), detail, tone, said_of)
    if patch.text is not None:
        agreement = patch.text.features()["ported_agreement"]
        yield Tile("Answers begin alike", percent(agreement), f"on {counted(patch.text.n_prompts, 'prompt')}")


def _worst_first(expected: Expected) -> list[tuple[str, Forecast]]:
    """The forecasts, that which may keep less first."""
    return sorted(expected.forecasts.items(), key=lambda item: item[1].low)


def _forecast_figure(patch: PatchReport) -> list[Html]:
    """The forecast among the outcomes that it was fitted on."""
    if patch.forecast is None or patch.drift is None or not math.isfinite(patch.drift.relative.value):
        return []
    expected, drift = patch.forecast, patch.drift.relative.value
    target, said = _worst_first(expected)[0]
    seen = seen_about(expected.shipped, drift, target)
    others = [(one.drift, one.retention[target]) for one in expected.shipped.outcomes if target in one.retention]
    title = seen_text(seen)
    explained = (
        f"Dots: patches on updates of {expected.shipped.base}, ported and measured; upright, the share of retraining's "
        f"gain in {target} that each kept. Square: the forecast for this patch. Shaded: updates that moved the weights "
        "about as far, from a third to three times."
    )
    here = Here("this patch", drift, said.retention, said.low, said.high, (drift / ABOUT, drift * ABOUT))
    kept = f"{percent(said.retention, digits=0)} ({percent(said.low, digits=0)} to {percent(said.high, digits=0)})"
    told = f"{title}; {kept} expected of this patch."
    picture = scatter(others, here, title=title, told=told, x_name="drift of the weights", ends=(0.0, 1.5))
    return [figure(title, explained, picture, outcome_rows(expected.shipped, target))]


def _update(update: UpdateReport) -> list[Html]:
    changes = [("field", "base", "evolved", "effect on a patch")]
    changes += [(c.field, _said(c.base), _said(c.evolved), EFFECTS[c.effect]) for c in update.config_changes]
    fit = (
        table(changes, label="Changes in config.json", wide={1, 2, 3})
        if len(changes) > 1
        else paragraph("config.json has no other change that matters to a patch.")
    )
    pairing = update.pairing
    names = {
        "Only in the base": pairing.removed,
        "Only in the evolved model": pairing.added,
        "With a different shape": [f"{name}: {old}, now {new}" for name, (old, new) in pairing.reshaped.items()],
        "With a different number of rows": [
            f"{name}: {old} rows, now {new}" for name, (old, new) in pairing.grown.items()
        ],
        "Not numeric": pairing.no_numbers,
        "Containing an infinity or NaN": update.broken,
    }
    lists = [folded(f"{what}: {len(found)}", bullets(found)) for what, found in names.items() if found]
    kinds = table(kind_rows(update), label="Drift by kind of module")
    return [
        folded("The update in numbers", facts(update_facts(update)), *lists),
        folded("Drift by kind of module", kinds),
        folded("Configuration", fit),
    ]


def _drift_figures(update: UpdateReport) -> list[Html]:
    cells = {place: found.relative.value for place, found in update.cells.items()}
    explained = "|W1 - W0| / |W0| of each matrix: the stronger the color, the farther the update moved it."
    if not update.is_full:
        explained += " Estimated from samples."
    return [_map(cells, stack, "Where the update changed the model", explained) for stack in stacks_of(cells)]


def _size_figures(patch: PatchReport, places: Mapping[TensorPlace, PlacedDelta]) -> list[Html]:
    cells = {place: found.relative_size for place, found in places.items()}
    explained = "The stronger the color, the larger the patch (|Δ| / |W1|). Blank where it changes nothing."
    if patch.n_rescaled:
        explained += " Excludes DoRA's rescaling of rows."
    return [_map(cells, stack, "Where the patch sits", explained) for stack in stacks_of(cells)]


def _map(cells: Mapping[TensorPlace, float], stack: str, title: str, explained: str) -> Html:
    inside = {
        place: value for place, value in cells.items() if place.stack == stack and place.kind in kinds_of(cells, stack)
    }
    finite = {place: value for place, value in inside.items() if math.isfinite(value)}
    largest = max(finite.values(), default=0.0)
    at = next((place for place, value in finite.items() if value == largest), None)
    told = f"{len(layers_of(inside, stack))} layers by {len(kinds_of(inside, stack))} kinds of modules"
    if at is not None:
        told += f"; the largest is {three_percent(largest)}, in layer {at.layer}, {at.kind}"
    several = f" ({stack})" if len(stacks_of(cells)) > 1 else ""
    picture = heatmap(
        inside, stack, title=title + several, told=f"{told}.", largest=largest, largest_text=three_percent(largest)
    )
    numbers = cell_rows({place: three_percent(value) for place, value in inside.items()}, stack)
    return figure(title + several, explained, picture, numbers)


def _kept_figure(patch: PatchReport) -> list[Html]:
    if not patch.rounding:
        return []
    rows = [
        Row(
            f"{dtype}, as the evolved model" if dtype == patch.stored_as else dtype,
            sums.kept_gain,
            percent(sums.kept_gain),
        )
        for dtype, sums in patch.rounding.items()
    ]
    title = "What a merge would keep of the patch"
    explained = (
        "How much of the patch survives rounding, by the dtype of the merged weights (kept gain); irrelevant while the "
        "patch is served as an adapter."
    )
    told = "; ".join(f"{row.name}: {row.text}" for row in rows)
    picture = bars(rows, title=title, told=told, unit="%", axis={KEPT_GAIN.value: percent(KEPT_GAIN.value, digits=0)})
    return [figure(title, explained, picture, [("stored as", "kept gain"), *((row.name, row.text) for row in rows)])]


def _spectra(places: Mapping[TensorPlace, PlacedDelta]) -> list[Html]:
    """A picture for each kind of module: singular values over all its layers."""
    by_kind: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for place, found in places.items():
        if any(found.spectrum):
            by_kind[place.kind].append(found.spectrum)
    if not by_kind:
        return []
    shown = [value for spectra in by_kind.values() for spectrum in spectra for value in spectrum if value > 0]
    limits = (min(shown) / 1.2, max(shown) * 1.2)
    pictures = (_spectrum(kind, by_kind[kind], limits) for kind in sorted(by_kind))
    explained = (
        "Singular values of s·B·A against the norm of the weight, |W1|: the line is the median over layers, the "
        "band spans minimum to maximum. A steep curve means that few directions hold most of the patch. All "
        "plots share the same axes."
    )
    return [folded("How many directions the patch uses", paragraph(explained, quiet=True), figures(*pictures))]


def _spectrum(kind: str, spectra: Sequence[tuple[float, ...]], limits: tuple[float, float]) -> Html:
    points, numbers = [], [("direction", "median", "least", "most")]
    for number in range(max(map(len, spectra))):
        values = [spectrum[number] for spectrum in spectra if len(spectrum) > number]
        middle, least, most = median(values), min(values), max(values)
        points.append(Point(number + 1, middle, least, most))
        numbers.append((str(number + 1), three_percent(middle), three_percent(least), three_percent(most)))
    told = f"From {numbers[1][1]} of the weight's norm in the first direction to {numbers[-1][1]} in the last."
    curve = Curve(kind, points)
    picture = lines([curve], title=kind, told=told, x_name="direction", unit="%", is_log=True, limits=limits)
    return figure(kind, f"{len(spectra)} tensors", picture, numbers)


def _said(value: object) -> str:
    return "not said" if value is None else str(value)
