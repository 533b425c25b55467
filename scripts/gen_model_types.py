"""Write what transformers knows of its model types to `checkpoint/model/model_types.json`.

    python scripts/gen_model_types.py            write it
    python scripts/gen_model_types.py --check    exit with 1 if the file is not what the installed transformers says

Every class that transformers loads a model type into for text, vision and text, or classification is built on the meta
device from its default configuration; those that cannot be built are listed, with the reason.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from portllm.checkpoint.model.asked import classes_of, facts_of
from portllm.checkpoint.model.families import FILE, SHARED
from portllm.foreign import REGISTRIES

OPEN: tuple[dict[str, int], ...] = ({}, {"head_dim": 64}, {"num_key_value_heads": 8}, {"vocab_size": 64})
"""Sizes that some configurations leave open, one after the other; no fact depends on them."""

OUT = Path(__file__).parents[1] / "src" / "portllm" / "checkpoint" / "model" / FILE


def gather() -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """The facts of every class by model type, and why some are not there."""
    found: dict[str, list[dict[str, Any]]] = {}
    parts: dict[str, list[dict[str, Any]]] = {}
    missing: dict[str, str] = {}
    for model_type in sorted({name for registry in REGISTRIES.values() for name in registry}):
        for name, task in classes_of(model_type):
            try:
                facts = built(model_type, name)
                of_part = facts.pop("part_type")
                found.setdefault(model_type, []).append({"task": task, **facts})
                if of_part is not None:
                    parts.setdefault(of_part, []).append({"task": task, **facts, "part": ""})
            except Exception as error:
                missing[f"{model_type} {name}"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return dict(sorted({**parts, **found}.items())), missing


def built(model_type: str, name: str) -> dict[str, Any]:
    """The facts of a class; where its defaults leave a size open that it needs, with one of `OPEN`."""
    for fields in OPEN:
        with contextlib.suppress(Exception):  # the classes are others', and raise what they like
            return facts_of(model_type, name, fields)
    return facts_of(model_type, name)


def render(found: dict[str, list[dict[str, Any]]]) -> str:
    """The file: a line for each model type, without what is as in the class before it."""
    orders = sorted(
        {tuple(leaf for leaf in order) for classes in found.values() for facts in classes for order in orders_of(facts)}
    )
    lines = [f"{json.dumps(SHARED)}: {json.dumps({'orders': orders})}"]
    for model_type, classes in found.items():
        before: dict[str, Any] = {}
        kept = []
        for facts in classes:
            kept.append({key: value for key, value in facts.items() if key not in before or before[key] != value})
            before = facts
        lines.append(f"{json.dumps(model_type)}: {json.dumps(kept)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def orders_of(facts: dict[str, Any]) -> list[list[str]]:
    """The parameters of each module of experts, in the module's order."""
    modules: dict[str, list[str]] = {}
    for end in facts["parameters"]:
        module, _, leaf = end.rpartition(".")
        modules.setdefault(module, []).append(leaf)
    return [leaves for module, leaves in modules.items() if module.endswith("experts")]


def main() -> int:
    """Write the file, or compare it."""
    parser = argparse.ArgumentParser(description="Write what transformers knows of its model types, or check it.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file is stale")
    check = parser.parse_args().check
    found, missing = gather()
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    text = render(found)
    if check:
        return int(OUT.read_text(encoding="utf-8") != text)
    OUT.write_text(text, encoding="utf-8")
    print(f"{OUT}: {len(found)} model types, {len(text)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
