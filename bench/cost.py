"""What porting costs beside fine-tuning again: trained parameters, peak memory, time, energy. Linux only.

    python -m bench.cost                                         # SmolLM2-135M, the demo's weights and fine-tuning
    python -m bench.cost --shapes mistral-7b [--device cuda]     # random weights of a real model's shapes
    python -m bench.cost --shapes mistral-7b --layers 4 --results /tmp/results   # does it work?

Each job is a process of its own, started as a user would start it; page cache warm. Writes `cost-SHAPE.json`, with the
machine described, and from all that are there the page `cost.md` and its pictures. Models of a shape are made, and
removed when it has been measured. What disk or memory have no room for is skipped, with a line.
"""

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.contests import Contest
from bench.cost_jobs import Baseline, on_demo, on_shape
from bench.cost_page import write_page
from bench.inputs import OUTPUTS, Inputs, NoRoomError
from bench.room import fitting
from bench.session import Session
from bench.shapes import PAPER, SHAPES, Shape
from portllm.checkpoint.open import open_checkpoint
from portllm.demo.settings import TRAIN
from portllm.demo.story import BASE

HERE = Path(__file__).parent
DEMO = "smollm2"
CHOICES = {"tiny": SHAPES["tiny"], **PAPER}


def main() -> None:
    """Measure, one shape after another, and write records and page."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    for name in options.shapes:
        measured = measure_demo(options) if name == DEMO else measure_shape(_shape(name, options.layers), options)
        if measured is None:
            continue
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / f"cost-{measured['name']}.json").write_text(json.dumps(measured, indent=1) + "\n")
        write_page(options.results)


def measure_demo(options: argparse.Namespace) -> dict[str, Any]:
    """The record of the demo's model."""
    work = options.work.resolve()
    contest = on_demo(work)
    described = {
        "name": DEMO,
        "like": f"{BASE}, trained weights",
        "n_params": open_checkpoint(str(work / "evolved")).n_params,
        "baseline": {"rank": TRAIN.rank, "batch": TRAIN.batch_size, "device": "cpu"},
    }
    return described | _measure(contest, work, options)


def measure_shape(shape: Shape, options: argparse.Namespace) -> dict[str, Any] | None:
    """The record of a shape; None where the disk has no room for its models."""
    folder = options.work.resolve() / "cost" / shape.name
    baseline = Baseline(options.rank, options.batch, options.tokens, options.steps, options.device)
    inputs = Inputs(shape, folder, rank=baseline.rank)
    try:
        contest = on_shape(inputs, baseline)
        inputs.require_room(0)
        described = {
            "name": shape.name,
            "like": f"{shape.like}, random weights",
            "n_params": shape.n_params,
            "baseline": {**asdict(baseline), "n_trained": shape.n_factors(baseline.rank)},
        }
        return described | _measure(contest, folder, options)
    except NoRoomError as error:
        print(f"{shape.name} is skipped: {error}", flush=True)
        return None
    finally:
        if not options.keep:
            shutil.rmtree(folder)


def _measure(contest: Contest, folder: Path, options: argparse.Namespace) -> Mapping[str, Any]:
    """The results of the jobs that there is memory for, and a line for each of the others."""
    jobs, skipped = fitting(contest.jobs)
    for line in skipped:
        print(f"skipped: {line}", flush=True)
    session = Session(folder, peers={})
    runs = {"runs": options.runs, "slow_runs": options.train_runs}
    result = session.measure("cost", replace(contest, jobs=jobs), **runs)
    session.end()
    shutil.rmtree(folder / OUTPUTS, ignore_errors=True)
    return {"contest": result, "skipped": list(skipped)}


def _shape(name: str, layers: int | None) -> Shape:
    """A shape, or that many of its blocks only."""
    whole = CHOICES[name]
    if layers is None:
        return whole
    like = f"{layers} of the {whole.layers} blocks of {whole.like}"
    return replace(whole, name=f"{name}-{layers}-layers", like=like, layers=layers)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = Baseline()
    parser.add_argument("--shapes", nargs="+", choices=sorted((DEMO, *CHOICES)), default=[DEMO])
    parser.add_argument("--layers", type=int, help="blocks of each shape; all, without it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=usual.device, help="to fine-tune and load on")
    parser.add_argument("--rank", type=int, default=usual.rank, help="of the patch of a shape")
    parser.add_argument("--batch", type=int, default=usual.batch, help="rows of a step of fine-tuning on a shape")
    parser.add_argument("--tokens", type=int, default=usual.tokens, help="of such a row")
    parser.add_argument("--steps", type=int, default=usual.steps, help="that are timed, after one that is not")
    parser.add_argument("--runs", type=int, default=3, help="of the short jobs")
    parser.add_argument("--train-runs", type=int, default=1, help="of fine-tuning")
    parser.add_argument("--keep", action="store_true", help="leave a shape's models on the disk")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="for models")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="for records and page")
    return parser.parse_args()


if __name__ == "__main__":
    main()
