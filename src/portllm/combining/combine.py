"""Combine several patches of one base into one, module by module; on factors, except for TIES and DARE."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from blake3 import blake3

from portllm import __version__
from portllm.combining.plan import EXACT, Combination, CombinePlan, CombineReport, plan_combine
from portllm.combining.side_by_side import Factors, side_by_side, values_of
from portllm.errors import PlanRefusedError, Refusal, refuse
from portllm.files.output_folder import staged_folder
from portllm.files.record import encode
from portllm.patch.adapter_config import AdapterConfig
from portllm.patch.adapter_folder import PatchLike, digest_tensors, files_of, load_patch, write_patch, write_record
from portllm.patch.card import write_patch_card
from portllm.patch.delta import LowRankDelta, RowValues
from portllm.patch.new_adapter import canonical_config
from portllm.patch.patch import Patch
from portllm.patch.record import Capture, PatchRecord
from portllm.progress import Progress, silent
from portllm.tensors.info import TensorInfo
from portllm.tensors.spool import SPOOL_FILE, Spool


def combine(
    patches: Sequence[PatchLike],
    *,
    out: str | Path,
    weights: Sequence[float] | None = None,
    how: Combination = EXACT,
    overwrite: bool = False,
    progress: Progress = silent,
) -> CombineReport:
    """Combine patches of one base and write the result to `out`, a folder that PEFT loads.

    Args:
        patches: At least two, opened with `load_patch`.
        out: The new patch's folder.
        weights: One weight per patch; 1 each by default.
        how: The combination rule.
        overwrite: Replace `out` if it exists.
        progress: Progress callback (modules).

    Raises:
        PlanRefusedError: The patches cannot be combined; lists every reason.
        NonFiniteError: A factor contains an infinity or NaN.
        OutputExistsError: `out` exists.
        OutputError: `out` cannot be written, or contains an input.
    """
    plan = plan_combine([load_patch(patch) for patch in patches], weights=weights, how=how)
    return run_combine(plan, Path(out), overwrite=overwrite, progress=progress)


def run_combine(plan: CombinePlan, out: Path, *, overwrite: bool = False, progress: Progress = silent) -> CombineReport:
    """Carry out a plan; see `combine`."""
    refuse(plan.refusals)
    inputs = [file for patch in plan.patches for file in files_of(patch)]
    with staged_folder(out, overwrite=overwrite, inputs=inputs) as folder:
        with Spool(folder / SPOOL_FILE) as spool:
            report = _combine(plan, folder, spool, progress)
        record = write_record(folder, report.record)
        write_patch_card(folder, load_patch(folder), record, own=None)
        return replace(report, record=record)


@dataclass(frozen=True, slots=True)
class _Made:
    """What became of a module: its factors, and what was cut off of its delta."""

    factors: Factors | None
    difference_sq: float = 0.0
    residual_sq: float = 0.0

    @property
    def rank(self) -> int:
        return 0 if self.factors is None else len(self.factors[0])

    @property
    def residual(self) -> float:
        return math.sqrt(self.residual_sq / self.difference_sq) if self.difference_sq else 0.0


def _combine(plan: CombinePlan, folder: Path, spool: Spool, progress: Progress) -> CombineReport:
    factors: dict[str, LowRankDelta[TensorInfo]] = {}
    found: dict[str, _Made] = {}
    for done, (module, numbers) in enumerate(plan.modules.items(), start=1):
        made = _made(
            [plan.patches[n].deltas[module] for n in numbers], [plan.weights[n] for n in numbers], plan, module
        )
        if made.factors is not None:
            a, b = made.factors
            delta = plan.patches[numbers[0]].deltas[module]
            factors[module] = LowRankDelta(
                a=spool.add_values(f"{module}.lora_A", a),
                b=spool.add_values(f"{module}.lora_B", b),
                scale=1.0,
                transposed=delta.transposed,
                is_embedding=delta.is_embedding,
            )
        found[module] = made
        progress("combine", done, len(plan.modules), "tensors")
    if not factors:
        raise PlanRefusedError([Refusal("patches", "they cancel out: the combined delta of every module is zero.")])
    fields = {"fan_in_fan_out": True} if plan.patches[0].config.fields.get("fan_in_fan_out") else {}
    ranks = {name: delta.rank for name, delta in factors.items()}
    config = AdapterConfig(canonical_config(ranks, fields={**fields, **plan.agreed.config}))
    rows = {
        name: RowValues(
            spool.add_values(name, np.stack([values_of(info)[place] for info, place in places.values()])), tuple(places)
        )
        for name, places in plan.agreed.rows.items()
    }
    patch = Patch("combined", factors, config, None, rows=rows, beside=plan.agreed.files)
    first = _record_of(plan.patches[0])
    base = first.base
    write_patch(folder, patch, base_name=base.name, base_revision=base.revision)
    for name, text in plan.agreed.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    total = _residual(found.values())
    residuals = {module: _rounded(made.residual) for module, made in found.items()}
    settings = {
        "method": str(plan.how),
        "inputs": [_input(patch, weight) for patch, weight in zip(plan.patches, plan.weights, strict=True)],
        "truncation_residual": _rounded(total),
        "truncation_residuals": {module: residual for module, residual in residuals.items() if residual},
    }
    capture = Capture("combine", settings, first.capture.fitted_to)
    # The way of the patch that was ported most often: a sum is no nearer to what it was trained on than its parts.
    ports = max((_record_of(each).ports for each in plan.patches), key=len)
    record = PatchRecord(
        program=__version__,
        base=base,
        capture=capture,
        ports=ports,
        tensors=digest_tensors(patch),
        files={},
        added_tokens=plan.agreed.added,
    )
    return CombineReport(record, {name: made.rank for name, made in found.items()}, residuals, total)


def _made(
    deltas: Sequence[LowRankDelta[TensorInfo]], weights: Sequence[float], plan: CombinePlan, module: str
) -> _Made:
    if plan.how == EXACT:  # nothing is left out, of however much
        return _Made(side_by_side(deltas, weights=weights, module=module))
    from portllm.combining.with_torch import combined  # loads torch, which an exact sum does without

    captured = combined(deltas, weights=weights, how=plan.how, module=module)
    delta = captured.delta
    factors = None if delta is None else (delta.a.float().numpy(), delta.b.float().numpy())
    return _Made(factors, captured.difference_sq, captured.residual_sq)


def _input(patch: Patch[TensorInfo], weight: float) -> dict[str, object]:
    """What the record says of one patch that went in."""
    record = encode(_record_of(patch))
    digest = blake3(json.dumps(record["tensors"], sort_keys=True).encode()).hexdigest()
    return {
        "name": patch.name,
        "weight": weight,
        "tensors": f"blake3:{digest}",
        "capture": record["capture"],
        "ports": record["ports"],
    }


def _record_of(patch: Patch[TensorInfo]) -> PatchRecord:
    assert patch.record is not None  # the plan refuses patches without one
    return patch.record


def _residual(found: Iterable[_Made]) -> float:
    parts = list(found)
    total = math.fsum(made.difference_sq for made in parts)
    return math.sqrt(math.fsum(made.residual_sq for made in parts) / total) if total else 0.0


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
