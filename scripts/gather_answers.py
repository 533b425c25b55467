"""Gather how many old answers ports kept, from the results of studies in which addition and align did the same work.

    python -m scripts.gather_answers

Writes `src/portllm/checking/answers.json`, which `portllm check` reads, from what is in `studies/results`. Only tasks
count whose answers are chosen among a few; whole texts hardly ever stay the same to the last word.
"""

import json
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "studies" / "results"
OUT = ROOT / "src" / "portllm" / "checking" / "answers.json"

METHODS = ("add", "align")

REPEATED = ("align-smollm2",)
"""Studies of the tasks, updates and seed of another: align-seeds-smollm2 has them, and a second seed."""


def gather(results: dict[str, Any], left_out: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """The patches of a study that each method has carried, and whose answers were compared, but those of some tasks."""
    rows = [row for row in results["tasks"] if row.get("agreement") and "sampled_drift" in (row.get("measured") or {})]
    rows = [row for row in rows if row["task"] not in left_out]
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
    """The text of the file: a line for each patch on each update."""
    cells = []
    for study in sorted((ROOT / "studies").glob("*.toml")):
        file = RESULTS / f"{study.stem}.json"
        if file.exists() and study.stem not in REPEATED:
            tasks = tomllib.loads(study.read_text(encoding="utf-8"))["tasks"]
            written = [name for name, task in tasks.items() if "max_new_tokens" in task]
            cells += gather(json.loads(file.read_text(encoding="utf-8")), written)
    lines = ",\n ".join(map(json.dumps, cells))
    return f"[\n {lines}\n]\n"


if __name__ == "__main__":
    OUT.write_text(render(), encoding="utf-8")
    print(f"{OUT}: {len(json.loads(OUT.read_text(encoding='utf-8')))} cases")
