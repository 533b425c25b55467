"""Combine several patches of one base into one, module by module; on factors, except for TIES and DARE."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from blake3 import blake3
from torch import Tensor

from portllm import __version__
from portllm.checkpoint.reading.spool import SPOOL_FILE, Spool
from portllm.checkpoint.reading.tensors import load
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.combining.agreed import Agreed, agree, is_of_added_tokens
from portllm.errors import NonFiniteError, PlanRefusedError, Refusal
from portllm.files.output_folder import staged_folder
from portllm.files.record import encode
from portllm.patch.adapter_config import AdapterConfig
from portllm.patch.adapter_folder import PatchLike, digest_tensors, files_of, load_patch, write_patch, write_record
from portllm.patch.capture import Captured
from portllm.patch.combine import Selection, concatenate, rerank, select
from portllm.patch.delta import LowRankDelta, RowValues
from portllm.patch.new_adapter import canonical_config
from portllm.patch.patch import Patch
from portllm.patch.record import Capture, PatchRecord
from portllm.progress import Progress, silent
from portllm.workers.one_thread import one_thread

NOT_ADDITIVE = ("use_dora", "target_parameters", "lora_bias", "modules_to_save")
"""Fields of a configuration whose tensors are more than deltas that add up."""


@dataclass(frozen=True, slots=True)
class Exact:
    """The exact weighted sum, optionally truncated to a rank.

    Attributes:
        rank: None adds up the ranks; `auto` drops directions within rounding noise; a number truncates to it.
    """

    rank: int | Literal["auto"] | None = None

    def __str__(self) -> str:
        return "concatenate" if self.rank is None else f"concatenate-rank{self.rank}"


@dataclass(frozen=True, slots=True)
class Selected:
    """The sum of elements selected by TIES or DARE, truncated to a rank.

    Attributes:
        method: `ties` or `dare`.
        density: Fraction of each delta's elements to keep, above 0 and at most 1.
        rank: Rank of the result; None for the sum of the patches' ranks.
        seed: Random seed.
    """

    method: Selection
    density: float
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density {self.density}: must be above 0 and at most 1.")

    def __str__(self) -> str:
        rank = "" if self.rank is None else f"-rank{self.rank}"
        return f"{self.method}-density{self.density:g}-seed{self.seed}{rank}"


Combination = Exact | Selected


@dataclass(frozen=True, slots=True)
class CombinePlan:
    """Patches about to become one.

    Attributes:
        patches: What goes in.
        weights: One for each.
        how: The combination rule.
        modules: For each module of the result, the numbers of the patches that change it.
        refusals: Every reason not to run.
        agreed: What goes along as it is.
    """

    patches: tuple[Patch[TensorInfo], ...]
    weights: tuple[float, ...]
    how: Combination
    modules: Mapping[str, tuple[int, ...]]
    refusals: tuple[Refusal, ...]
    agreed: Agreed


@dataclass(frozen=True, slots=True)
class CombineReport:
    """Result of combining patches.

    Attributes:
        record: The content of the new `patch.json`.
        ranks: By module.
        residuals: By module, the truncation residual: the norm of what was cut off, relative to the combined delta.
        truncation_residual: Of all modules together.
    """

    record: PatchRecord
    ranks: Mapping[str, int]
    residuals: Mapping[str, float]
    truncation_residual: float

    def __repr__(self) -> str:
        return f"CombineReport({len(self.ranks)} modules, truncation_residual={self.truncation_residual:.3g})"


def plan_combine(
    patches: Sequence[Patch[TensorInfo]], *, weights: Sequence[float] | None = None, how: Combination = Exact()
) -> CombinePlan:
    """Plan to combine patches of one base.

    Args:
        patches: At least two.
        weights: One weight per patch; 1 each by default.
        how: The combination rule.

    Raises:
        ValueError: There are not as many weights as patches, or one is no number.
    """
    given = tuple(weights) if weights is not None else (1.0,) * len(patches)
    if len(given) != len(patches):
        raise ValueError(f"{len(given)} weights for {len(patches)} patches: pass one weight per patch.")
    if not all(map(math.isfinite, given)):
        raise ValueError(f"weights {given}: each must be a finite number.")
    refusals = [refusal for patch in patches for refusal in _mismatches(patch, patches[0])]
    if len(patches) < 2:
        refusals.append(Refusal("patches", f"{len(patches)} given; expected two or more."))
    modules: dict[str, tuple[int, ...]] = {}
    for module in sorted({module for patch in patches for module in patch.deltas}):
        shapes = {patch.name: patch.deltas[module].shape for patch in patches if module in patch.deltas}
        if len(set(shapes.values())) > 1:
            said = ", ".join(f"(out={out}, in={width}) in {name}" for name, (out, width) in shapes.items())
            refusals.append(Refusal(module, f"the deltas are {said}. Only deltas of the same shape can be combined."))
        numbers = tuple(n for n, patch in enumerate(patches) if module in patch.deltas and given[n])
        if numbers:
            modules[module] = numbers
    if not modules:
        refusals.append(Refusal("--weights", "all weights are zero, so the result would be empty."))
    agreed = agree([patch for patch, weight in zip(patches, given, strict=True) if weight] or patches)
    refusals += agreed.refusals
    return CombinePlan(tuple(patches), given, how, modules, tuple(sorted(refusals)), agreed)


def combine(
    patches: Sequence[PatchLike],
    *,
    out: str | Path,
    weights: Sequence[float] | None = None,
    how: Combination = Exact(),
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
        return replace(report, record=write_record(folder, report.record))


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
    rows = {name: RowValues(spool.add(name, found.values), found.rows) for name, found in plan.agreed.values().items()}
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
            if rank is None:
                return Captured(whole, rerank(whole).difference_sq, 0.0, 0.0)
            return rerank(whole, rank=None if rank == "auto" else rank)
        case Selected(method=method, density=density, rank=rank, seed=seed):
            wanted = sum(delta.rank for delta in deltas) if rank is None else rank
            return select(deltas, weights=weights, method=method, density=density, rank=wanted, seed=seed, name=module)


def _weights_of(record: PatchRecord) -> str:
    fitted = record.capture.fitted_to
    return "the base itself" if fitted is None else f"the base quantized to {fitted.scheme}"


def _mismatches(patch: Patch[TensorInfo], first: Patch[TensorInfo]) -> list[Refusal]:
    """Why one patch cannot be combined with the first."""
    if patch.record is None:
        return [
            Refusal(
                patch.name,
                "has no patch.json, so its base is unknown. Record it once: portllm capture --adapter "
                f"{patch.name} --base BASE -o PATCH.",
            )
        ]
    refusals = []
    if first.record is not None and patch.record.base.fingerprint != first.record.base.fingerprint:
        refusals.append(
            Refusal(
                patch.name,
                f"belongs to {patch.record.base.name} ({patch.record.base.fingerprint}), {first.name} to "
                f"{first.record.base.name} ({first.record.base.fingerprint}). Port it first: portllm port "
                f"{patch.name} --evolved {first.record.base.name} -o PATCH.",
            )
        )
    if first.record is not None and patch.record.capture.fitted_to != first.record.capture.fitted_to:
        refusals.append(
            Refusal(
                patch.name,
                f"was trained on {_weights_of(patch.record)}, but {first.name} on {_weights_of(first.record)}: "
                "their sum would match neither.",
            )
        )
    used = [field for field in NOT_ADDITIVE if patch.config.fields.get(field)]
    if patch.config.fields.get("bias") not in (None, "none"):
        used.append("bias")
    if not is_of_added_tokens(patch):
        used.append("trainable_token_indices")
    if patch.values or patch.resized or used:
        refusals.append(
            Refusal(
                patch.name,
                f"contains more than low-rank deltas ({', '.join(used) or 'tensors stored in full'}), and only "
                "those can be added. Capture it from checkpoints with --dense drop, or train it without these.",
            )
        )
    if bool(patch.config.fields.get("fan_in_fan_out")) != bool(first.config.fields.get("fan_in_fan_out")):
        refusals.append(Refusal(patch.name, f"its fan_in_fan_out differs from that of {first.name}."))
    return refusals


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
