"""The published schemas say what the program lets pass: they are made from its classes, and fit what it wrote."""

import json
import tomllib
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from portllm.files.record import encode
from portllm.files.seal import render_sealed
from scripts.gen_schemas import SCHEMAS, SOURCE, render
from tests.patch.test_adapter_folder import BAD_RECORDS, RECORD

ARTEFACTS = Path(__file__).parents[1] / "artefacts"
FILES = {
    "patch/patch.schema.json": sorted(ARTEFACTS.glob("*/*/patch.json")),
    "certifying/certificate.schema.json": sorted(ARTEFACTS.glob("*/*/certificate.json")),
    "fleets/fleet.schema.json": sorted(ARTEFACTS.glob("*/*/fleet.toml")),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_what_its_class_lets_pass(name):
    assert (SOURCE / name).read_text() == render(name)
    Draft202012Validator.check_schema(json.loads(render(name)))


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_a_file_of_an_earlier_version_fits(name, file):
    read = tomllib.loads if file.suffix == ".toml" else json.loads
    Draft202012Validator(json.loads(render(name))).validate(read(file.read_text()))


def test_a_record_fits_and_what_is_refused_does_not():
    validator = Draft202012Validator(json.loads(render("patch/patch.schema.json")))
    assert validator.is_valid(json.loads(render_sealed(encode(RECORD))))
    sealed = {
        what: json.loads(render_sealed(record)) if isinstance(record, dict) else record
        for what, record in BAD_RECORDS.items()
    }
    assert [what for what, record in sealed.items() if validator.is_valid(record)] == []
