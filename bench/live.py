"""What runs models, beside lm-evaluation-harness, TRL with PEFT, and transformers. Linux only.

    python -m bench.live [--contests evaluate-labels train align] [--runs 3] [--record]
    python -m bench.live --runs 1 --slow-runs 1 --rows 24 --prompts 32 --results /tmp/results --record   # does it work?

On the demo's files, which are made where they are not. What is measured is compared with what was recorded, as by
`bench.speed`; with `--record` the results and the page are written anew.
"""

import argparse
import importlib.metadata
import json
import signal
import sys
from pathlib import Path

from bench.live_contests import CONTESTS
from bench.live_inputs import LiveInputs
from bench.live_page import NAME, write_page
from bench.live_rows import ROWS
from bench.page import table
from bench.peers.environment import peer_version
from bench.session import Session
from bench.speed import fallen_behind, warn_if_busy

HERE = Path(__file__).parent


def main() -> None:
    """Measure, compare, and record where that is asked for."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    warn_if_busy()
    inputs = LiveInputs(options.work.resolve(), options.rows, options.prompts)
    chosen = options.contests or CONTESTS
    inputs.make()
    if "align-wide" in chosen:
        inputs.make_wide()
    peers = {"lm-eval": importlib.metadata.version("lm_eval"), "trl": peer_version("trl")}
    session = Session(inputs.folder, peers=peers)
    now = {
        name: session.measure(name, CONTESTS[name](inputs), runs=options.runs, slow_runs=options.slow_runs)
        for name in chosen
    }
    print("\n".join(table(ROWS, now)))
    file = options.results / f"{NAME}.json"
    recorded = json.loads(file.read_text())["contests"] if file.exists() else {}
    worse = fallen_behind(ROWS, recorded, now)
    if options.record:
        options.results.mkdir(parents=True, exist_ok=True)
        all_of_them = {**recorded, **now}
        order = {name: all_of_them[name] for name in CONTESTS if name in all_of_them}
        file.write_text(json.dumps({"shape": "smollm2", "contests": order}, indent=1) + "\n")
        write_page(options.results)
    session.end()
    for line in worse:
        print(f"WORSE than recorded: {line}", file=sys.stderr)
    sys.exit(1 if worse and not options.record else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.live", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contests", nargs="+", choices=sorted(CONTESTS), help="else all")
    parser.add_argument("--runs", type=int, default=3, help="of each tool")
    parser.add_argument("--slow-runs", type=int, default=2, help="of a tool that takes minutes")
    parser.add_argument("--rows", type=int, help="of the held-out passages, the first of them; all, without it")
    parser.add_argument("--prompts", type=int, default=256, help="of an aligned port, the first of them")
    parser.add_argument("--record", action="store_true", help="write the results and the page")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="for the demo, and tools of others")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="what was recorded")
    return parser.parse_args()


if __name__ == "__main__":
    main()
