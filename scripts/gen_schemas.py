"""Writes the JSON schemas that are published beside the classes they are made from.

    python scripts/gen_schemas.py

`tests/files/test_schemas.py` fails where a file differs from what would be written.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import msgspec

from portllm.certifying.certificate import Certificate
from portllm.exporting.export import ExportRecord
from portllm.files.record import NamedBlake3, Recorded
from portllm.fleets.file import FleetTable
from portllm.patch.record import PatchRecord

SOURCE = Path(__file__).parents[1] / "src" / "portllm"
SCHEMAS: dict[str, tuple[type[Recorded], str]] = {
    "patch/patch.schema.json": (PatchRecord, "patch.json"),
    "certifying/certificate.schema.json": (Certificate, "certificate.json"),
    "exporting/export.schema.json": (ExportRecord, "export.json"),
    "fleets/fleet.schema.json": (FleetTable, "fleet.toml"),
}
WIDTH = 120
_ATTRIBUTE = re.compile(r"^(\w+): ((?:.|\n(?=    ))*)", re.MULTILINE)


def render(name: str) -> str:
    """The text of a schema: what a class lets pass, with the words of its docstring."""
    cls, title = SCHEMAS[name]
    schema = msgspec.json.schema(cls)
    for definition in schema["$defs"].values():
        describe(definition)
    root = schema["$defs"][cls.__name__]
    root["title"] = title
    if title.endswith(".json"):
        root["required"].append("seal")
        root["properties"]["seal"] = msgspec.json.schema(NamedBlake3) | {
            "description": "blake3 digest of everything else in this file, as JSON with sorted keys, no spaces, and "
            "ASCII only."
        }
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"https://portllm.invalid/{Path(name).name}",
    }
    return laid_out(head | schema) + "\n"


def laid_out(value: Any, indent: str = "") -> str:
    """JSON on one line where that is short enough, as people write schemas."""
    line = json.dumps(value)
    if not isinstance(value, dict) or len(indent) + len(line) < WIDTH:
        return line
    inside = indent + "  "
    parts = ",\n".join(f"{inside}{json.dumps(key)}: {laid_out(item, inside)}" for key, item in value.items())
    return f"{{\n{parts}\n{indent}}}"


def describe(definition: dict[str, Any]) -> None:
    """Puts each part of a class's docstring where it belongs."""
    told, _, attributes = inspect.cleandoc(definition.pop("description", "")).partition("\n\nAttributes:\n")
    definition["description"] = " ".join(told.split())
    cls = next(cls for cls in recorded(Recorded) if cls.__name__ == definition["title"])
    words = {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(inspect.cleandoc(attributes))}
    for field in msgspec.structs.fields(cls):
        if field.name in words:
            definition["properties"][field.encode_name]["description"] = words[field.name]


def recorded(cls: type[Recorded]) -> list[type[Recorded]]:
    """Every class of what stands in files."""
    return [one for below in cls.__subclasses__() for one in (below, *recorded(below))]


if __name__ == "__main__":
    for name in SCHEMAS:
        (SOURCE / name).write_text(render(name), encoding="utf-8")
