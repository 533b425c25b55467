"""A worker process of a fleet: a job a line on stdin, its result a line on stdout, until stdin ends."""

import json
import os
import signal
import sys

from portllm.fleets.cell import CellWorker


def main() -> None:
    """Work until there is no more."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # clean up what is half written
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no result
    worker = CellWorker()
    for line in sys.stdin:
        results.write(json.dumps(worker.do(json.loads(line))) + "\n")
        results.flush()


if __name__ == "__main__":
    main()
