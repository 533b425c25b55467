"""Results that are kept between runs, and reused only where their inputs prove that they are the same.

A record holds everything that its result depends on: settings, identities of inputs, versions of the programs. It
holds the identity of the files that the work wrote, too, so that they can be told from others.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from portllm.errors import PortLLMError
from portllm.files.input_file import read_input
from portllm.files.json_text import parse_json
from portllm.files.own_files import write_text
from portllm.files.record import Recorded, encode
from portllm.files.typed import decode

PROGRAMS = ("portllm", "torch", "transformers", "peft")


class Record(Recorded, frozen=True):
    """What stands in a record's file.

    Attributes:
        inputs: All that the result depends on, with the versions of programs, as JSON values.
        files: The identity of the files that the work wrote.
        seconds: How long the work took.
        result: What it found, as JSON values.
    """

    inputs: Mapping[str, Any]
    files: str
    seconds: float
    result: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kept:
    """The result of one piece of work.

    Attributes:
        result: What it found, as JSON values.
        seconds: How long the work took when it was done.
        reused: Whether that was in an earlier run.
    """

    result: Mapping[str, object]
    seconds: float
    reused: bool


@cache
def versions() -> Mapping[str, str]:
    """Versions of the programs that a result depends on."""
    import importlib.metadata  # brings readers of mail and archives along, for which few runs have a use

    return {name: importlib.metadata.version(name) for name in PROGRAMS}


def keep(
    place: Path,
    *,
    inputs: Mapping[str, object],
    identify: Callable[[], str],
    work: Callable[[], Mapping[str, object]],
) -> Kept:
    """Do a piece of work, or reuse what an earlier run did with the same inputs, if its files are as it left them.

    Args:
        place: The JSON file to keep the result in.
        inputs: All that the result depends on.
        identify: The identity of the files that the work writes, from the files themselves; it raises `PortLLMError`
            where they are not there.
        work: Writes the files and returns the result as JSON values.
    """
    known = read_record(place)
    if known is not None and known.inputs == with_versions(inputs) and known.files == identity_or_none(identify):
        return Kept(known.result, known.seconds, reused=True)
    record = do(place, inputs=inputs, identify=identify, work=work)
    return Kept(record.result, record.seconds, reused=False)


def do(
    place: Path,
    *,
    inputs: Mapping[str, object],
    identify: Callable[[], str],
    work: Callable[[], Mapping[str, object]],
) -> Record:
    """Do a piece of work and write its record, whole or not at all; arguments as for `keep`."""
    place.unlink(missing_ok=True)
    began = time.perf_counter()
    # Through JSON and back, so that a fresh result is the very value that a later run will read.
    result = json.loads(json.dumps(work()))
    seconds = time.perf_counter() - began
    record = Record(with_versions(inputs), identify(), seconds, result)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, json.dumps(encode(record), indent=2, sort_keys=True) + "\n")
    return record


def read_record(place: Path) -> Record | None:
    """The record in a file; None where there is none that is whole."""
    # The program's own file: damage to it means no more than that the work is done again.
    try:
        return decode(Record, parse_json(read_input(place)))
    except (OSError, ValueError):
        return None


def with_versions(inputs: Mapping[str, object]) -> dict[str, Any]:
    """Inputs as a record holds them: as JSON values, with the versions of the programs."""
    value: dict[str, Any] = json.loads(json.dumps({**inputs, "versions": dict(versions())}))
    return value


def identity_or_none(identify: Callable[[], str]) -> str | None:
    """The identity of files, or None where they are not there or not whole."""
    try:
        return identify()
    except PortLLMError:
        return None
