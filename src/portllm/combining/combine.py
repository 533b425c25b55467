"""Combine several patches of one base into one, module by module; on factors, except for TIES and DARE."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from portllm import __version__
from portllm.checkpoint.reading.spool import SPOOL_FILE, Spool
from portllm.checkpoint.reading.tensors import load
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.combining.plan import EXACT, Combination, CombinePlan, CombineReport, Exact, Selected, plan_combine
from portllm.errors import NonFiniteError, PlanRefusedError, Refusal
from portllm.files.output_folder import staged_folder
from portllm.files.record import encode
from portllm.patch.adapter_config import AdapterConfig
from portllm.patch.adapter_folder import PatchLike, digest_tensors, files_of, load_patch, write_patch, write_record
from portllm.patch.capture import Captured
from portllm.patch.card import write_patch_card
from portllm.patch.combine import concatenate, rerank, select
from portllm.patch.delta import LowRankDelta, RowValues
from portllm.patch.new_adapter import canonical_config
from portllm.patch.patch import Patch
from portllm.patch.record import Capture, PatchRecord
from portllm.progress import Progress, silent
from portllm.workers.one_thread import one_thread


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
    if plan.refusals:
        raise PlanRefusedError(plan.refusals)
    inputs = [file for patch in plan.patches for file in files_of(patch)]
    with staged_folder(out, overwrite=overwrite, inputs=inputs) as folder, one_thread():
        with Spool(folder / SPOOL_FILE) as spool:
            report = _combine(plan, folder, spool, progress)
        record = write_record(folder, report.record)
        write_patch_card(folder, load_patch(folder), record, own=None)
        return replace(report, record=record)


def _combine(plan: CombinePlan, folder: Path, spool: Spool, progress: Progress) -> CombineReport:
    factors: dict[str, LowRankDelta[TensorInfo]] = {}
    found: dict[str, Captured] = {}
    for done, (module, numbers) in enumerate(plan.modules.items(), start=1):
        deltas = [_loaded(plan.patches[number].deltas[module], module) for number in numbers]
        found[module] = _combined(deltas, [plan.weights[number] for number in numbers], plan.how, module)
        combined = found[module].delta
        if combined is not None:
            factors[module] = LowRankDelta(
                a=spool.add(f"{module}.lora_A", combined.a.float()),
                b=spool.add(f"{module}.lora_B", combined.b.float()),
                scale=1.0,
                transposed=plan.patches[numbers[0]].deltas[module].transposed,
                is_embedding=plan.patches[numbers[0]].deltas[module].is_embedding,
            )
        progress("combine", done, len(plan.modules), "tensors")
    if not factors:
        raise PlanRefusedError([Refusal("patches", "they cancel out: the combined delta of every module is zero.")])
    fields = {"fan_in_fan_out": True} if plan.patches[0].config.fields.get("fan_in_fan_out") else {}
    ranks = {name: delta.rank for name, delta in factors.items()}
    config = AdapterConfig(canonical_config(ranks, fields={**fields, **plan.agreed.config}))
    rows = {
        name: RowValues(
            spool.add(name, torch.stack([load(info)[place] for info, place in found.values()]).float()), tuple(found)
        )
        for name, found in plan.agreed.rows.items()
    }
    patch = Patch("combined", factors, config, None, rows=rows, beside=plan.agreed.files)
    first = _record_of(plan.patches[0])
    base = first.base
    write_patch(folder, patch, base_name=base.name, base_revision=base.revision)
    for name, text in plan.agreed.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    total = _residual(found.values())
    residuals = {module: _rounded(captured.truncation_residual) for module, captured in found.items()}
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
    return CombineReport(record, {name: captured.rank for name, captured in found.items()}, residuals, total)


def _combined(
    deltas: Sequence[LowRankDelta[Tensor]], weights: Sequence[float], how: Combination, module: str
) -> Captured:
    match how:
        case Exact(rank=rank):
            whole = concatenate(deltas, weights=weights)
            if rank is None:  # nothing is left out, of however much
                return Captured(whole, 0.0, 0.0, None)
            return rerank(whole, rank=None if rank == "auto" else rank)
        case Selected(method=method, density=density, rank=rank, seed=seed):
            wanted = sum(delta.rank for delta in deltas) if rank is None else rank
            return select(deltas, weights=weights, method=method, density=density, rank=wanted, seed=seed, name=module)


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


def _loaded(delta: LowRankDelta[TensorInfo], module: str) -> LowRankDelta[Tensor]:
    a, b = load(delta.a), load(delta.b)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise NonFiniteError(f"'{module}': a patch contains an infinity or NaN. The training run may have diverged.")
    return LowRankDelta(a=a, b=b, scale=delta.scale)


def _residual(found: Iterable[Captured]) -> float:
    parts = list(found)
    total = math.fsum(captured.difference_sq for captured in parts)
    return math.sqrt(math.fsum(captured.residual_sq for captured in parts) / total) if total else 0.0


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
