"""Speed and memory beside the peers: cp, cat, PEFT, mergekit. Linux only.

    python -m bench.speed [--shapes 1.1b 1b-128k] [--contests copy merge] [--runs 5] [--record]

What is measured is compared with what was recorded: a row that is worse by more than the noise of both measurements
ends the program with exit status 1. With `--record` the results and the page are written anew. A session that was cut
off goes on with its next run.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contests import CONTESTS
from bench.inputs import Inputs, NoRoomError
from bench.page import table, write_page
from bench.peers.environment import peer_version
from bench.rows import ROWS, Row, Value, evaluate, is_worse, show
from bench.session import Session
from bench.shapes import SHAPES

HERE = Path(__file__).parent
DEFAULT_SHAPES = ("16m", "1.1b", "1b-128k", "8b")


BUSY = 0.5
"""Load above which another program surely takes part of a core."""


def main() -> None:
    """Measure, compare, and record where that is asked for."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    warn_if_busy()
    worse: list[str] = []
    for shape in (SHAPES[name] for name in options.shapes):
        file = options.results / f"speed-{shape.name}.json"
        recorded = json.loads(file.read_text())["contests"] if file.exists() else {}
        inputs = Inputs(shape, options.work.resolve() / "speed" / shape.name)
        session = Session(inputs.folder, peers={"mergekit": peer_version("mergekit")})
        now = measure_shape(inputs, session, options)
        print("\n".join(table(ROWS, now)))
        worse += [f"{shape.name}: {line}" for line in fallen_behind(ROWS, recorded, now)]
        if options.record and now:
            options.results.mkdir(parents=True, exist_ok=True)
            order = {name: {**recorded, **now}[name] for name in CONTESTS if name in {**recorded, **now}}
            file.write_text(json.dumps({"shape": shape.name, "contests": order}, indent=1) + "\n")
            write_page(options.results)
        session.end()
    for line in worse:
        print(f"WORSE than recorded: {line}", file=sys.stderr)
    sys.exit(1 if worse and not options.record else 0)


def warn_if_busy() -> None:
    """Say so where other programs take part of the machine."""
    if (load := os.getloadavg()[0]) > BUSY:
        print(f"the machine is busy (load {load:.1f}): these times are not for the record", file=sys.stderr)


def measure_shape(inputs: Inputs, session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """The results of each contest of a shape; one for which the disk has no room is skipped, with a line."""
    results = {}
    for name in options.contests or inputs.shape.contests:
        try:
            contest = CONTESTS[name](inputs)
            inputs.require_room(0)
        except NoRoomError as error:
            print(f"{inputs.shape.name}: {name} is skipped: {error}")
            continue
        results[name] = session.measure(name, contest, runs=options.runs, slow_runs=options.slow_runs)
    return results


def fallen_behind(rows: Sequence[Row], recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is worse than it was. Seconds of another machine say nothing of ours; ratios and memory do."""
    lines = []
    for row in rows:
        if row.must is None or not (row.is_measured(recorded) and row.is_measured(now)):
            continue
        then, result = recorded[row.contest], now[row.contest]
        is_time = row.quantity.endswith("seconds") and row.how != "ratio"
        if is_time and any(then["machine"][key] != result["machine"][key] for key in ("processor", "cores")):
            continue
        before, value = evaluate(row, then), evaluate(row, result)
        if is_worse(row, before, value):
            lines.append(f"{row.title}: {_with_range(row, value)}, was {_with_range(row, before)}")
    return lines


def _with_range(row: Row, value: Value) -> str:
    return f"{show(row, value.median)} ({show(row, value.low)} to {show(row, value.high)})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=DEFAULT_SHAPES)
    parser.add_argument("--contests", nargs="+", choices=sorted(CONTESTS), help="else all that the shape has")
    parser.add_argument("--runs", type=int, default=5, help="of each tool")
    parser.add_argument("--slow-runs", type=int, default=2, help="of a tool that takes minutes")
    parser.add_argument("--record", action="store_true", help="write the results and the page")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="for models, and tools of others")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="what was recorded")
    return parser.parse_args()


if __name__ == "__main__":
    main()
