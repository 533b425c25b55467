"""Gather how many old answers ports kept, from the results of studies in which addition and align did the same work.

    python -m scripts.gather_answers

Writes `src/portllm/checking/answers.json`, which `portllm check` reads, from all that is in `studies/results`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "studies" / "results"
OUT = ROOT / "src" / "portllm" / "checking" / "answers.json"

METHODS = ("add", "align")


def gather(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The patches of a study that each method has carried, and whose answers were compared."""
    rows = [row for row in results["tasks"] if row.get("agreement") and "sampled_drift" in (row.get("measured") or {})]
    by_patch: dict[str, dict[str, Any]] = {}
    for row in rows:
        by_patch.setdefault(f"{row['task']} on {row['evolution']}.{row['link']}", {})[row["method"]] = row
    for patch, carried in by_patch.items():
        if carried.keys() >= set(METHODS):
            yield {
                "base": results["base"],
                "patch": patch,
                "drift": carried["add"]["measured"]["sampled_drift"],
                "kept": {method: round(carried[method]["agreement"]["value"], 4) for method in METHODS},
            }


def render() -> str:
    """The text of the file: a line for each patch."""
    files = sorted(RESULTS.glob("*.json"))
    studies = [values for file in files if "tasks" in (values := json.loads(file.read_text(encoding="utf-8")))]
    lines = ",\n ".join(json.dumps(cell) for results in studies for cell in gather(results))
    return f"[\n {lines}\n]\n"


if __name__ == "__main__":
    OUT.write_text(render(), encoding="utf-8")
    print(f"{OUT}: {len(json.loads(OUT.read_text(encoding='utf-8')))} patches")
