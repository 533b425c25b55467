"""Do one cell: check the patch, port it to the evolved model, merge it, and bring what was written to its place.

A job and its result are JSON values, so that they can go to another process or another machine.
"""

import math
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from portllm.checkpoint.header import TensorInfo
from portllm.checkpoint.identity import fingerprint
from portllm.checkpoint.reader import Checkpoint, on_disk, open_checkpoint
from portllm.checkpoint.seal import render_sealed
from portllm.checkpoint.writer import DEFAULT_SHARD_BYTES, staged_folder
from portllm.errors import CheckpointError, OutputBusyError, PlanRefusedError, PortLLMError, RemoteError, StorageError
from portllm.many.storage import digests, fetch_patch, is_url, join, publish, remove, sizes
from portllm.output.manifest import MANIFEST_FILE
from portllm.patch.adapter_folder import RECORD_FILE, load_patch
from portllm.patch.patch import Patch
from portllm.pipeline.plan import PortPlan, plan_merge, plan_port_on, require
from portllm.pipeline.port import run_port
from portllm.pipeline.update import Update

Job = Mapping[str, Any]
Result = dict[str, Any]

CHECK_FILE = "check.json"
RECORDS = {"check": CHECK_FILE, "port": RECORD_FILE, "merge": MANIFEST_FILE}
"""The file of each step's output that vouches for the others."""

NO = ("will not hold", "cannot be ported")
"""Verdicts of a check after which nothing is ported."""


class Worker:
    """Does one cell after another; the models of the last one stay open for the next.

    Example:
        >>> Worker().do({"folder": "v2/a", "evolved": {"place": "nowhere"}, "base": None})["status"]
        'failed'
    """

    def __init__(self) -> None:
        self._update: Update | None = None
        self._of: tuple[object, object] | None = None

    def do(self, job: Job) -> Result:
        """What became of a cell; an error becomes a status, a reason, and whether it may pass."""
        began = time.monotonic()
        try:
            result = self._do(job)
        except PlanRefusedError as error:
            result = {"status": "refused", "reason": str(error)}
        except PortLLMError as error:
            result = {"status": "failed", "reason": str(error), "can_pass": _can_pass(error)}
        except MemoryError:
            result = {"status": "failed", "reason": "no memory was left.", "can_pass": True}
        except Exception:  # a bug in one cell stops no other; its traceback is the reason
            result = {"status": "failed", "reason": traceback.format_exc().strip()}
        return {**result, "seconds": round(time.monotonic() - began, 3)}

    def _do(self, job: Job) -> Result:
        update = self._open(job)
        place = join(job["output"], job["folder"])
        with tempfile.TemporaryDirectory(prefix="portllm-fleet-") as name:
            scratch = Path(name)
            patch = load_patch(fetch_patch(job["patch"]["place"], scratch / "patch"))
            patch = replace(patch, name=job["patch"]["place"])
            plan = plan_port_on(patch, update, **job["options"].get("port", {}))
            if job["dry"]:
                require(plan)
                return {"status": "done", "facts": _forecast(plan, job)}
            facts: dict[str, Any] = {}
            if "check" in job["steps"]:
                facts["check"] = _check(patch, update, job, place, scratch)
                if facts["check"]["verdict"] in NO:
                    for step in ("port", "merge"):
                        remove(join(place, step), records=[RECORDS[step]])
                    reason = "\n".join(str(reason["text"]) for reason in facts["check"]["reasons"])
                    return {"status": "no", "facts": facts, "reason": reason, **_written(["check"], place)}
            require(plan)
            for step in RECORDS.keys() - set(job["steps"]):  # of an earlier run that was asked for more
                remove(join(place, step), records=[RECORDS[step]])
            facts |= _run(plan, job, place, scratch)
        return {"status": "done", "facts": facts, **_written(job["steps"], place)}

    def _open(self, job: Job) -> Update:
        """The two models; opened again only where the last cell had others."""
        of = (job["base"], job["evolved"])
        if self._update is None or self._of != of:
            base = None if job["base"] is None else _open(job["base"])
            evolved = _open(job["evolved"])
            self._update = Update(base, on_disk(evolved) if "merge" in job["steps"] and not job["dry"] else evolved)
            self._of = of
        return self._update


def _open(model: Mapping[str, Any]) -> Checkpoint:
    """A model by the name that the fleet's file has for it.

    Raises:
        CheckpointError: It is not the one that the fleet was planned with.
    """
    checkpoint = replace(open_checkpoint(model["place"]), name=model["said"])
    found = fingerprint(checkpoint)
    if found != model["fingerprint"]:
        raise CheckpointError(
            f"'{model['said']}': has fingerprint {found}; when the fleet was planned it was {model['fingerprint']}. It "
            "was changed, or is another one on this machine. Run again."
        )
    return checkpoint


def _forecast(plan: PortPlan, job: Job) -> dict[str, Any]:
    """What a dry run says of a cell."""
    facts: dict[str, Any] = {"port": _port_facts(plan)}
    if "merge" in job["steps"]:
        # The ported patch does not exist yet; the patch itself has the same shapes, and belongs to another model.
        merged = plan_merge(plan.patch, into=plan.evolved, allow_other_base=True, **_layout(job))
        require(merged)
        facts["merge"] = {"bytes": merged.n_bytes}
    return facts


def _run(plan: PortPlan, job: Job, place: str, scratch: Path) -> dict[str, Any]:
    """Port and merge; each output is at its place when it is whole."""
    facts: dict[str, Any] = {}
    if job["steps"] == ["check"]:
        return facts
    facts["port"] = _port_facts(plan)
    ported: list[Patch[TensorInfo]] = []
    with_port = "port" in job["steps"]

    def port(out: Path) -> None:
        ported.append(run_port(plan, out, overwrite=True))

    _place(port, join(place, "port") if with_port else None, scratch / "port", "port")
    if "merge" in job["steps"]:

        def merge(out: Path) -> None:
            facts["merge"] = _merge(ported[0], plan.evolved, job, out)

        _place(merge, join(place, "merge"), scratch / "merge", "merge")
    return facts


def _check(patch: Patch[TensorInfo], update: Update, job: Job, place: str, scratch: Path) -> dict[str, object]:
    """The verdict, whose whole report is written to its place."""
    from portllm.pipeline.check import check  # loads numpy's parts and torch, which porting does without
    from portllm.pipeline.check_report import patch_to_json, update_to_json

    if update.base is None:
        raise TypeError("a fleet's file that asks for a check names the base")
    allowed = bool(job["options"].get("port", {}).get("allow_other_base", False))
    full = bool(job["options"].get("check", {}).get("full", False))
    report = check(patch, base=update.base, evolved=update.evolved, full=full, allow_other_base=allowed)
    told = patch_to_json(report.patches[0])

    def write(out: Path) -> None:
        with staged_folder(out, overwrite=True) as folder:
            text = render_sealed({"update": update_to_json(report.update), **told})
            (folder / CHECK_FILE).write_text(text, encoding="utf-8")

    _place(write, join(place, "check"), scratch / "check", "check")
    return {name: told[name] for name in ("verdict", "reasons")}


def _place(write: Callable[[Path], None], place: str | None, staged: Path, step: str) -> None:
    """Write an output to its place: through a local folder where that is behind a URL, and there alone without one."""
    if place is None or is_url(place):
        write(staged)
        if place is not None:
            publish(staged, place, records=[RECORDS[step]])
    else:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        write(Path(place))


def _merge(ported: Patch[TensorInfo], evolved: Checkpoint, job: Job, out: Path) -> dict[str, object]:
    from portllm.pipeline.blocks import Nearest, Stochastic  # loads torch, which porting does without
    from portllm.pipeline.merge import run_merge

    options = job["options"].get("merge", {})
    rounding = Stochastic(options.get("seed", 0)) if options.get("rounding") == "stochastic" else Nearest()
    plan = plan_merge(ported, into=evolved, **_layout(job))
    report = run_merge(plan, out, rounding=rounding, overwrite=True)
    measures = {"kept_gain": report.total.kept_gain, "rounding_loss": report.total.rounding_loss}
    told = {name: value if math.isfinite(value) else None for name, value in measures.items()}  # JSON has no infinity
    return {"bytes": report.n_bytes, **told, "notes": list(plan.notes)}


def _layout(job: Job) -> dict[str, Any]:
    options = job["options"].get("merge", {})
    gigabytes = options.get("max_shard_size", DEFAULT_SHARD_BYTES / 10**9)
    return {"dtype": options.get("dtype"), "shard_bytes": int(gigabytes * 10**9)}


def _port_facts(plan: PortPlan) -> dict[str, object]:
    return {"modules": len(plan.patch.deltas) + len(plan.patch.experts), **plan.evidence}


def _written(steps: list[str], place: str) -> Result:
    """What a run can compare when it is asked to go on: the files, and the digests of the records."""
    records = digests(place, [join(step, RECORDS[step]) for step in steps])
    return {"files": sizes(place), "records": records}


def _can_pass(error: PortLLMError) -> bool:
    """Whether the same cell may work when it is tried again."""
    return isinstance(error, RemoteError | OutputBusyError) or (isinstance(error, StorageError) and error.can_pass)
