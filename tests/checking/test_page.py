"""The page of check says what JSON says, the verdict first, and stays whole whatever files call things."""

from dataclasses import replace
from pathlib import Path

import pytest

from portllm.checking.check import check_weights
from portllm.checking.forecast import shipped
from portllm.checking.outcomes import seen_about
from portllm.checking.page import check_page
from portllm.checking.report import patch_to_json
from portllm.checking.tables import seen_text
from portllm.checking.update.config_changes import ConfigChange, Effect
from portllm.checking.update.report import update_to_json
from portllm.checkpoint.open import open_checkpoint
from portllm.matching.token_rows import TokenMap
from portllm.patch.adapter_folder import load_patch
from portllm.show.numbers import percent, three_digits, three_percent
from tests.show.html.reading import EVIL, Page, with_texts


@pytest.fixture(scope="module")
def checked(tiny):
    """`checked("evolved", drift=0.1)`: the report of the tiny adapter, or of several, on another model."""

    def run(kind="evolved", *, adapters=1, **how):
        patches = [load_patch(tiny("adapter", seed=seed)) for seed in range(1, adapters + 1)]
        base, evolved = open_checkpoint(tiny("base")), open_checkpoint(tiny(kind, **(how or {"drift": 0.00003})))
        return check_weights(*patches, base=base, evolved=evolved, places=True)

    return run


def cells_of(page, title):
    head, *rows = page.tables[f"{title}, in numbers"]
    return {(int(row[0]), kind): text for row in rows for kind, text in zip(head[1:], row[1:], strict=True) if text}


def test_the_verdict_and_its_reasons_come_first(checked):
    report = checked()
    page = Page(check_page(report, about={"date": "1 May"}))
    patch, base, evolved = (report.patches[0].name, report.update.base.name, report.update.evolved.name)
    assert page.shown[1] == f"{Path(patch).name} from {Path(base).name} to {Path(evolved).name}"
    assert page.shown[2:4] == ["patch", Path(patch).name]
    assert page.shown[8:12] == ["read", "samples", "date", "1 May"]
    assert page.shown[12:14] == ["✓ ", f"Holds: {Path(patch).name} on {Path(evolved).name}; port it as it is"]
    assert page.shown[14].startswith(report.patches[0].verdict.reasons[0].text)
    assert "ours: on updates of SmolLM2-135M" in page.shown[14]
    assert not any(str(Path(patch).parent) in text for text in page.shown)


def test_the_forecast_stands_among_the_outcomes_that_it_was_fitted_on(checked):
    report = checked(drift=0.004)
    patch = report.patches[0]
    seen = seen_about(shipped(), patch.drift.relative.value, "accuracy")
    assert 0 < seen.kept < seen.n
    page = Page(check_page(report))
    assert seen_text(seen) in page.shown
    outcomes = [one for one in shipped().outcomes if "accuracy" in one.retention]
    assert [given.get("class") for name, given in page.elements if name == "circle"].count("other s1") == len(outcomes)
    counted = page.tables[f"{seen_text(seen)}, in numbers"][1:]
    assert sum(int(row[1]) for row in counted) == len(outcomes)
    at = page.shown.index("Expected to keep")
    assert page.shown[at + 1] == percent(patch.forecast.forecasts["accuracy"].retention, digits=0)


def test_the_numbers_of_both_heatmaps_are_those_of_json(checked):
    report = checked()
    page = Page(check_page(report))
    patch, update = patch_to_json(report.patches[0]), update_to_json(report.update)
    sizes = {(cell["layer"], cell["kind"]): three_percent(cell["relative_size"]) for cell in patch["layers"]}
    assert cells_of(page, "Where the patch sits") == sizes
    assert len(sizes) == 14
    drift = {
        (cell["layer"], cell["kind"]): three_percent(cell["relative"]["value"])
        for cell in update["layers"]
        if cell["layer"] is not None and not cell["kind"].endswith("norm")
    }
    assert cells_of(page, "Where the update changed the model") == drift


def test_the_tables_say_what_json_says(checked):
    report = checked()
    page = Page(check_page(report))
    patch, update = patch_to_json(report.patches[0]), update_to_json(report.update)
    assert f"{three_percent(patch['relative_size'])} of the norm" in page.text
    assert f"{three_digits(patch['size_against_drift'])} times their drift" in page.text
    assert f"cosine {patch['cosine_with_drift']:.4f}" in page.text
    kept = dict(page.tables["What a merge would keep of the patch, in numbers"][1:])
    assert kept["BF16, as the evolved model"] == percent(patch["kept_gain"]["BF16"])
    kinds = {row[0]: row for row in page.tables["Drift by kind of module"][1:]}
    for kind, found in update["kinds"].items():
        assert kinds[kind][2].startswith(three_digits(100 * found["relative"]["value"]))
        assert kinds[kind][5] == f"{found['cosine']['value']:.5f}"


def test_a_spectrum_is_the_median_over_the_layers_of_what_json_has(checked):
    report = checked()
    page, layers = Page(check_page(report)), patch_to_json(report.patches[0])["layers"]
    spectra = [cell["spectrum"] for cell in layers if cell["kind"] == "mlp.up_proj"]
    assert len(spectra) == 2
    rows = page.tables["mlp.up_proj, in numbers"][1:]
    assert [row[1] for row in rows] == [three_percent(sum(pair) / 2) for pair in zip(*spectra, strict=True)]
    assert [row[2] for row in rows] == [three_percent(min(pair)) for pair in zip(*spectra, strict=True)]


def test_the_same_report_is_the_same_page(checked):
    assert check_page(checked()) == check_page(checked())


def test_several_patches_are_a_table_and_a_section_each(checked):
    report = checked(adapters=3, drift=0.02)
    page = Page(check_page(report, [("broken", "has no adapter_config.json")]))
    at = page.shown.index("✗ ")
    assert page.shown[at + 1 : at + 3] == [
        "3 patches on " + report.update.evolved.name + ": 3 uncertain", "broken: has no adapter_config.json",
    ]  # fmt: skip
    assert [row[:2] for row in page.tables["All patches"][1:]] == [
        ["uncertain", patch.name] for patch in report.patches
    ]
    assert [name for name, _ in page.elements].count("h2") == 1 + 3
    links = [given["href"] for name, given in page.elements if name == "a"]
    assert links == [f"#{given['id']}" for name, given in page.elements if name == "section" and "id" in given]
    assert len(links) == 3
    assert page.text.count("Where the update changed the model") == 2  # once in sight, once in the picture


def test_a_patch_that_cannot_be_ported_has_its_reasons_and_no_picture_of_itself(checked):
    page = Page(check_page(checked("base", inner=24)))
    assert any(text.startswith("cannot be ported") for text in page.texts)
    assert "the delta is (out=20, in=12)" in page.text
    assert "Where the patch sits, in numbers" not in page.tables
    assert "With a different shape: 6" in page.text


def test_what_the_configuration_changed_stands_in_a_table(checked):
    report = checked()
    change = ConfigChange("rope theta", 1e4, None, Effect.POSITION)
    page = Page(check_page(replace(report, update=replace(report.update, config_changes=(change,)))))
    row = page.tables["Changes in config.json"][1]
    assert row == ["rope theta", "10000.0", "not said", "attention encodes positions differently"]


def test_an_infinite_drift_does_not_spoil_the_picture(checked):
    report = checked()
    place, cell = next((place, cell) for place, cell in report.update.cells.items() if place.kind == "mlp.up_proj")
    broken = replace(cell, relative=replace(cell.relative, value=float("inf")))
    update = replace(report.update, cells={**report.update.cells, place: broken})
    page = Page(check_page(replace(report, update=update)))
    assert cells_of(page, "Where the update changed the model")[place.layer, place.kind] == "infinite"


def test_no_name_of_a_file_is_markup(checked):
    report = checked(adapters=2, drift=0.02)
    change = ConfigChange("activation", "silu", {"a": ["b"]}, Effect.FUNCTION)
    tokens = TokenMap((0, 2), {1: "token"})
    pairing = replace(report.update.pairing, added=("a",), removed=("b",), no_numbers=("c",))
    report = replace(
        report,
        update=replace(report.update, config_changes=(change,), tokens=tokens, pairing=pairing, broken=("d",)),
    )
    harmless, evil = (
        Page(check_page(with_texts(report, text), [(f"folder{text}", f"error{text}")])) for text in ("x", EVIL)
    )
    assert evil.skeleton == harmless.skeleton
    assert "alert(1)" in evil.text
