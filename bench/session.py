"""Run contests: the jobs of each take turns. Every run is kept at once, so that a session that was cut off goes on."""

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import portllm
from bench.cache import cool, settle, warm
from bench.contests import Contest, Job
from bench.inputs import OUTPUTS
from bench.measure import Run, machine, measure, summarize
from portllm.files.kept_results import versions

Kept = dict[str, Any]


class Session:
    """The runs so far on one shape, in a file; those of another state of the program do not count."""

    def __init__(self, folder: Path, *, peers: Mapping[str, str]) -> None:
        """Look for runs in a folder.

        Args:
            folder: Where jobs write, too.
            peers: Versions of programs of others that take part.
        """
        self.folder = folder
        self._peers = peers
        self._file = folder / "session.json"
        kept = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._kept: Kept = kept if kept.get("program") == digest_program() else {"program": digest_program()}

    def measure(self, name: str, contest: Contest, *, runs: int, slow_runs: int) -> dict[str, Any]:
        """The results of a contest: of each job its runs, and what was found out about its output."""
        kept = self._kept.setdefault(name, {"machine": _described(self.folder, self._peers), "jobs": {}})
        wanted = {job.name: slow_runs if job.is_slow else runs for job in contest.jobs}
        for turn in range(max(wanted.values())):
            first = turn % len(contest.jobs)  # another one begins each time
            for job in (*contest.jobs[first:], *contest.jobs[:first]):
                done = kept["jobs"].setdefault(job.name, {"runs": [], "facts": {}})
                if not done["runs"] and not job.is_slow:
                    self._run(job, is_cold=False)  # its program comes into the page cache
                if len(done["runs"]) <= turn < wanted[job.name]:
                    run, facts = self._run(job, is_cold=contest.is_cold)
                    done["runs"].append(asdict(run))
                    done["facts"] |= facts
                    self._file.write_text(json.dumps(self._kept))
                    print(f"{name}: {job.label}, run {turn + 1}: {describe(run)}", flush=True)
        return {
            "title": contest.title,
            "cache": "cold" if contest.is_cold else "warm",
            "machine": kept["machine"],
            "jobs": {job.name: _result(job, kept["jobs"][job.name], wanted[job.name]) for job in contest.jobs},
        }

    def end(self) -> None:
        """Forget the runs: the next session measures anew."""
        self._file.unlink(missing_ok=True)

    def _run(self, job: Job, *, is_cold: bool) -> tuple[Run, Mapping[str, float | str]]:
        outputs, cache = self.folder / OUTPUTS, self.folder / "cache"
        for folder in (outputs, cache):  # parts of an output, or digests in the cache, would leave less to do
            shutil.rmtree(folder, ignore_errors=True)
        outputs.mkdir()
        settle()
        (cool if is_cold else warm)(job.reads)
        run = measure(job.command, env={"HF_HUB_OFFLINE": "1", "PORTLLM_CACHE": str(cache)}, good=job.good)
        facts = job.facts(job.output) if job.facts and job.output else {}
        shutil.rmtree(outputs)
        return run, facts


def digest_program() -> str:
    """Of all source files of the program: runs of different programs are never mixed."""
    files = sorted(Path(portllm.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _described(folder: Path, peers: Mapping[str, str]) -> dict[str, Any]:
    programs = {**versions(), "safetensors": importlib.metadata.version("safetensors"), **peers}
    return {**machine(folder), "versions": programs}


def describe(run: Run) -> str:
    """A run in a line."""
    return f"{run.seconds:.2f} s, {run.private_bytes / 1e6:.0f} MB private"


def _result(job: Job, kept: Kept, n_runs: int) -> dict[str, Any]:
    summary = summarize([Run(**run) for run in kept["runs"][:n_runs]])
    return {"label": job.label, "is_ours": job.is_ours, "facts": kept["facts"], **summary}
