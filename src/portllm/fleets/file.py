"""The TOML file that describes a fleet: read and checked at once, every problem with its line and key."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from msgspec import UNSET, Meta, UnsetType

from portllm.errors import FleetFileError, UnknownMethodError
from portllm.files.record import END, Recorded, one_of
from portllm.files.toml_file import read_toml, told
from portllm.files.typed import EACH_ONCE, problems
from portllm.methods.table import method_named

Step: TypeAlias = Literal["check", "port", "merge"]

STEPS: tuple[Step, ...] = ("check", "port", "merge")
"""What can be done for a patch and an evolved model, in the order in which it is done."""

Place: TypeAlias = Annotated[
    str, Meta(pattern=rf"^[^\x00]+{END}", description="a text that is not empty and has no NUL")
]
Places: TypeAlias = Annotated[tuple[Place, ...], EACH_ONCE]


class CheckTable(Recorded, frozen=True):
    """`[check]`: options of the command `check`."""

    full: bool | UnsetType = UNSET


class PortTable(Recorded, frozen=True):
    """`[port]`: options of the command `port`."""

    method: str | UnsetType = UNSET
    allow_other_base: bool | UnsetType = UNSET


class MergeTable(Recorded, frozen=True):
    """`[merge]`: options of the command `merge`."""

    dtype: Annotated[str, one_of("F64", "F32", "F16", "BF16")] | UnsetType = UNSET
    rounding: Annotated[str, one_of("nearest", "stochastic")] | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    max_shard_size: Annotated[float, Meta(ge=0.001, description="a number, 0.001 or more")] | UnsetType = UNSET


class FleetTable(Recorded, frozen=True):
    """The keys of a fleet's file.

    Attributes:
        patches: Folders, globs or URLs.
        evolved: Models.
        do: What is done for each pair.
        output: A folder or a URL.
        base: The model that the patches belong to, where they do not say, or need its weights.
        check: Options of that step.
        port: Likewise.
        merge: Likewise.
    """

    patches: Places
    evolved: Places
    do: Annotated[tuple[Annotated[str, one_of(*STEPS)], ...], EACH_ONCE]
    output: Place
    base: Place | UnsetType = UNSET
    check: CheckTable | UnsetType = UNSET
    port: PortTable | UnsetType = UNSET
    merge: MergeTable | UnsetType = UNSET


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
        options: Of each step, by its name: those that are given.
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
        FleetFileError: It cannot be read, is not TOML, or says what a fleet cannot be; with every problem.
    """
    text, values = read_toml(file, kind="fleet", error=FleetFileError)
    if found := list(problems_of(values)):
        raise FleetFileError(told(file, text, found))
    return FleetFile(
        file=file,
        patches=tuple(values["patches"]),
        evolved=tuple(values["evolved"]),
        base=values.get("base"),
        steps=tuple(step for step in STEPS if step in values["do"]),
        output=values["output"],
        options={step: values.get(step, {}) for step in STEPS},
    )


def problems_of(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Everything that is wrong with the values of a file: the path to the key, and what it is.

    Example:
        >>> fleet = {"patches": ["a"], "evolved": ["b"], "do": ["port"], "output": "c"}
        >>> list(problems_of(fleet))
        []
        >>> list(problems_of({**fleet, "port": {"metod": "add"}}))
        [(('port', 'metod'), 'unknown key. Did you mean method?')]
    """
    found = list(problems(values, FleetTable))
    yield from found
    wrong = {path[0] for path, _ in found}
    if "do" not in wrong:
        for step in {"check", "merge"} & values.keys() - set(values["do"]):  # merging alone ports, too
            yield (step,), f"has options, but do = {json.dumps(values['do'])} does not {step}"
        if "check" in values["do"] and "base" not in values:
            yield ("do",), "check compares evolved models with their base: base is required"
    if "port" not in wrong:
        try:
            method_named(values.get("port", {}).get("method", "add"), has_prompts=False)
        except UnknownMethodError as error:
            yield ("port", "method"), str(error)
