"""Results that are kept between runs, and reused only where a key proves that they are the same.

A record holds everything that its result depends on: settings, identities of inputs, versions of the programs. It
holds the identity of the files that the work wrote, too, and that is taken afresh from disk before they are reused.
"""

import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from portllm.errors import PortLLMError

PROGRAMS = ("portllm", "torch", "transformers", "peft")


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


def versions() -> dict[str, str]:
    """Versions of the programs that a result depends on."""
    return {name: importlib.metadata.version(name) for name in PROGRAMS}


def keep(
    record: Path,
    *,
    inputs: Mapping[str, object],
    identify: Callable[[], str],
    work: Callable[[], Mapping[str, object]],
) -> Kept:
    """Do a piece of work, or reuse what an earlier run did with the same inputs.

    Args:
        record: The JSON file to keep the result in.
        inputs: All that the result depends on.
        identify: The identity of the files that the work writes, from the files themselves; it raises `PortLLMError`
            where they are not there.
        work: Writes the files and returns the result as JSON values.
    """
    key = blake3(json.dumps({**inputs, "versions": versions()}, sort_keys=True).encode()).hexdigest()
    known = _read(record)
    if known is not None and known["key"] == key and known["files"] == _identity_or_none(identify):
        return Kept(known["result"], known["seconds"], reused=True)
    record.unlink(missing_ok=True)
    began = time.perf_counter()
    # Through JSON and back, so that a fresh result is the very value that a later run will read.
    result = json.loads(json.dumps(work()))
    seconds = time.perf_counter() - began
    record.parent.mkdir(parents=True, exist_ok=True)
    part = record.with_suffix(".part")
    content = {"key": key, "inputs": dict(inputs), "files": identify(), "seconds": seconds, "result": result}
    part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(record)
    return Kept(result, seconds, reused=False)


def _identity_or_none(identify: Callable[[], str]) -> str | None:
    try:
        return identify()
    except PortLLMError:
        return None


def _read(record: Path) -> dict[str, Any] | None:
    # The program's own file: damage to it means no more than that the work is done again.
    try:
        value = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and {"key", "files", "seconds", "result"} <= set(value) else None
