"""Do one cell: port the patch to the evolved model, merge it, and bring what was written to its place.

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
from portllm.checkpoint.writer import DEFAULT_SHARD_BYTES
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

RECORDS = {"port": RECORD_FILE, "merge": MANIFEST_FILE}
"""The file of each step's output that vouches for the others."""


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
            facts, files, records = self._do(job)
            result: Result = {"status": "done", "facts": facts, "files": files, "records": records}
        except PlanRefusedError as error:
            result = {"status": "refused", "reason": str(error)}
        except PortLLMError as error:
            result = {"status": "failed", "reason": str(error), "can_pass": _can_pass(error)}
        except MemoryError:
            result = {"status": "failed", "reason": "no memory was left.", "can_pass": True}
        except Exception:  # a bug in one cell stops no other; its traceback is the reason
            result = {"status": "failed", "reason": traceback.format_exc().strip()}
        return {**result, "seconds": round(time.monotonic() - began, 3)}

    def _do(self, job: Job) -> tuple[dict[str, Any], dict[str, int], dict[str, str]]:
        update = self._open(job)
        place = join(job["output"], job["folder"])
        with tempfile.TemporaryDirectory(prefix="portllm-fleet-") as name:
            scratch = Path(name)
            patch = load_patch(fetch_patch(job["patch"]["place"], scratch / "patch"))
            plan = plan_port_on(replace(patch, name=job["patch"]["place"]), update, **job["options"].get("port", {}))
            require(plan)
            if job["dry"]:
                return _forecast(plan, job), {}, {}
            for step in RECORDS.keys() - set(job["steps"]):  # of an earlier run that was asked for more
                remove(join(place, step), records=[RECORDS[step]])
            facts = _run(plan, job, place, scratch)
        return facts, *_written(job["steps"], place)

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
    """Carry out the steps; each output is at its place when it is whole."""
    facts: dict[str, Any] = {"port": _port_facts(plan)}
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


def _written(steps: list[str], place: str) -> tuple[dict[str, int], dict[str, str]]:
    """What a run can compare when it is asked to go on: the files, and the digests of the records."""
    files = sizes(place)
    return files, digests(place, [join(step, RECORDS[step]) for step in steps])


def _can_pass(error: PortLLMError) -> bool:
    """Whether the same cell may work when it is tried again."""
    return isinstance(error, RemoteError | OutputBusyError) or (isinstance(error, StorageError) and error.can_pass)
