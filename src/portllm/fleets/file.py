"""The TOML file that describes a fleet: read, checked against its schema, every problem with its line and key."""

import importlib.resources
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

import fastjsonschema

from portllm.errors import FleetFileError, UnknownMethodError
from portllm.files.toml_text import line_of, meant
from portllm.methods.table import method_named

Step: TypeAlias = Literal["check", "port", "merge"]

STEPS: tuple[Step, ...] = ("check", "port", "merge")
"""What can be done for a patch and an evolved model, in the order in which it is done."""


@dataclass(frozen=True, slots=True)
class FleetFile:
    """What a fleet's file says.

    Attributes:
        file: Where it is; relative places in it are relative to its folder.
        patches: Folders, globs or URLs.
        evolved: Models.
        base: The model that the patches belong to, where they do not say, or need its weights.
        steps: What is done, in the order of `STEPS`.
        output: A folder or a URL.
        options: Of each step, by its name.
    """

    file: Path
    patches: tuple[str, ...]
    evolved: tuple[str, ...]
    base: str | None
    steps: tuple[Step, ...]
    output: str
    options: Mapping[str, Mapping[str, object]]


def read_fleet_file(file: Path) -> FleetFile:
    """Read and check a fleet's file.

    Raises:
        FleetFileError: It cannot be read, is not TOML, or breaks the schema; with every problem, line and key.
    """
    try:
        text = file.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        raise FleetFileError(f"'{file}': cannot be read: {error.strerror}. Pass the fleet's TOML file.") from error
    except ValueError as error:  # of TOML, which names the line, or of UTF-8
        raise FleetFileError(f"'{file}': is not valid TOML: {error}.") from error
    problems = [f"'{file}'{_place(text, path)}: {problem}" for path, problem in problems_of(values)]
    if problems:
        raise FleetFileError("\n".join(problems))
    return FleetFile(
        file=file,
        patches=tuple(values["patches"]),
        evolved=tuple(values["evolved"]),
        base=values.get("base"),
        steps=tuple(step for step in STEPS if step in values["do"]),
        output=values["output"],
        options={step: values.get(step, {}) for step in STEPS},
    )


def problems_of(values: Mapping[str, object]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Everything that is wrong with the values of a file: the path to the key, and what it is.

    Example:
        >>> fleet = {"patches": ["a"], "evolved": ["b"], "do": ["port"], "output": "c"}
        >>> list(problems_of(fleet))
        []
        >>> list(problems_of({**fleet, "port": {"metod": "add"}}))
        [(('port', 'metod'), 'unknown key. Did you mean method?')]
    """
    checked = json.loads(json.dumps(values, default=lambda _: None))  # a copy; no key takes one of TOML's dates
    while True:
        try:
            _validator()(checked)
            break
        except fastjsonschema.JsonSchemaValueException as error:
            path = tuple(str(part) for part in error.path[1:])
            if error.rule == "additionalProperties":
                known = error.definition["properties"]
                for key in sorted(set(error.value) - set(known)):
                    yield (*path, key), f"unknown key. {meant(key, known)}"
                    del error.value[key]
            elif error.rule == "required":
                for key in sorted(set(error.definition["required"]) - set(error.value)):
                    yield (), f"{key} is required"
                    _forget(checked, (key,))
            else:
                yield path, error.message.partition(" ")[2]
                _forget(checked, path)
    for step in STEPS:
        if step != "port" and step in checked and step not in checked["do"]:  # merging alone ports, too
            yield (step,), f"has options, but do = {json.dumps(checked['do'])} does not {step}"
    if "check" in checked["do"] and "base" not in checked:
        yield ("do",), "check compares evolved models with their base: base is required"
    try:
        method_named(checked.get("port", {}).get("method", "add"))
    except UnknownMethodError as error:
        yield ("port", "method"), str(error)


def _forget(values: dict[str, object], path: Sequence[str]) -> None:
    """Put something valid where a problem was found, so that the next one is found; optional keys are removed."""
    top, rest = path[0], path[1:]
    if rest and top in STEPS:
        table = values[top]
        if isinstance(table, dict):
            del table[rest[0]]
    elif top in ("patches", "evolved"):
        values[top] = ["-"]
    elif top == "do":
        values[top] = list(STEPS)
    elif top == "output":
        values[top] = "-"
    else:
        del values[top]


def _place(text: str, path: Sequence[str]) -> str:
    """`, line 3, merge.dtype` for a key that stands on the third line."""
    if not path:
        return ""
    keys = path[:2] if path[0] in STEPS else path[:1]
    line = line_of(text, keys)
    return (f", line {line}" if line else "") + ", " + ".".join(keys)


@cache
def _validator() -> Callable[[object], object]:
    text = importlib.resources.files("portllm.fleets").joinpath("fleet.schema.json").read_text(encoding="utf-8")
    compiled: Callable[[object], object] = fastjsonschema.compile(json.loads(text))
    return compiled
