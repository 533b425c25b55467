"""Keys of cells and what is done about them, from values alone."""

from dataclasses import replace

import pytest
from msgspec import structs

from portllm.fleets.plan import FleetRow, FleetWork, ModelEntry, PatchEntry, cells_of, decide, stranger

PATCHES = tuple(PatchEntry(name, f"/{name}", f"blake3:{name}", 10) for name in "ab")
MODELS = tuple(ModelEntry(name, name, f"/{name}", f"s4k1:{name}", 100) for name in ("v2", "v3"))
WORK = FleetWork(
    ModelEntry("v1", "v1", "/v1", "s4k1:v1", 100), ("port", "merge"), {"port": {}, "merge": {"seed": 1}}, "/out"
)
CELL = cells_of(PATCHES, MODELS, WORK)[0]
FILES = {"port/patch.json": 5, "port/adapter_model.safetensors": 50}
RECORDS = {"port/patch.json": "digest"}
DONE = FleetRow(CELL.folder, CELL.key, "done", files=FILES, records=RECORDS)


def test_the_cells_of_one_model_follow_each_other():
    assert [cell.folder for cell in cells_of(PATCHES, MODELS, WORK)] == ["v2/a", "v2/b", "v3/a", "v3/b"]


@pytest.mark.parametrize(
    ("patch", "model", "work"),
    [
        (replace(PATCHES[0], identity="blake3:other"), MODELS[0], WORK),
        (PATCHES[0], replace(MODELS[0], fingerprint="s4k1:other"), WORK),
        (PATCHES[0], MODELS[0], replace(WORK, base=None)),
        (PATCHES[0], MODELS[0], replace(WORK, base=MODELS[1])),
        (PATCHES[0], MODELS[0], replace(WORK, steps=("port",))),
        (PATCHES[0], MODELS[0], replace(WORK, options={"port": {}, "merge": {"seed": 2}})),
        (PATCHES[0], MODELS[0], replace(WORK, options={"port": {"method": "add"}, "merge": {"seed": 1}})),
    ],
)
def test_a_key_changes_with_everything_that_the_result_depends_on(patch, model, work):
    assert cells_of([patch], [model], work)[0].key != CELL.key


def test_a_key_does_not_depend_on_where_things_are():
    moved = cells_of([replace(PATCHES[0], place="/x")], [replace(MODELS[0], place="/y")], replace(WORK, output="/z"))
    assert moved[0].key == CELL.key


def todo(row, files=FILES, records=RECORDS, *, overwrite=False):
    return decide(CELL, row, files=files, records=records, overwrite=overwrite)


def test_what_is_done_and_there_is_kept():
    assert todo(DONE) == "keep"
    assert todo(DONE, overwrite=True) == "keep"


@pytest.mark.parametrize(
    ("row", "files", "records"),
    [
        (None, {}, {}),
        (DONE, {}, {}),
        (DONE, {**FILES, "port/adapter_model.safetensors": 49}, RECORDS),
        (DONE, FILES, {"port/patch.json": "another"}),
        (structs.replace(DONE, status="waiting"), FILES, RECORDS),
        (structs.replace(DONE, status="failed"), FILES, RECORDS),
        (structs.replace(DONE, status="refused"), {}, {}),
        (structs.replace(DONE, key="another"), {}, {}),
    ],
)
def test_what_is_missing_damaged_or_was_not_finished_is_done_again(row, files, records):
    assert todo(row, files, records) == "run"


@pytest.mark.parametrize("row", [None, structs.replace(DONE, key="another")])
def test_what_was_not_written_for_these_inputs_is_replaced_only_when_told_to(row):
    assert todo(row) == "refuse"
    assert todo(row, overwrite=True) == "run"
    assert "--overwrite" in stranger(CELL, row).reason
