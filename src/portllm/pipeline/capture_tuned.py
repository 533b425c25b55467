"""Capture a patch from two checkpoints: the difference of each pair of tensors, cut to its rank, one after another.

Memory holds one dense difference at a time, in float32, whatever the size of the models; what was found goes to disk
before the next one is read. Tensors of equal bytes are not read again once both digests are known.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from portllm import __version__
from portllm.checkpoint.families import family_of
from portllm.checkpoint.header import TensorInfo
from portllm.checkpoint.identity import digest_of, own_tensors, tensor_digests
from portllm.checkpoint.reader import Checkpoint, on_disk
from portllm.checkpoint.tensors import TORCH_DTYPES, encode, load_rows
from portllm.checkpoint.writer import check_apart, check_free, staged_folder
from portllm.errors import PlanRefusedError, Refusal
from portllm.linalg import square_sum, working_dtype
from portllm.patch.adapter_config import AdapterConfig
from portllm.patch.adapter_folder import digest_tensors, write_patch, write_record
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.capture import BLOCK_ELEMENTS, Captured, RoundingNoise, truncate
from portllm.patch.delta import ExpertsDelta, LowRankDelta, WholeValue
from portllm.patch.new_adapter import canonical_config, place_values, stored_name
from portllm.patch.patch import Patch
from portllm.patch.record import Capture, PatchRecord
from portllm.pipeline.capture_experts import are_equal, capture_experts, not_finite
from portllm.pipeline.one_thread import one_thread
from portllm.pipeline.spool import SPOOL_FILE, Spool
from portllm.pipeline.token_rows import runs
from portllm.pipeline.tuned_plan import Dense, Pair, RowMap, TunedPlan, plan_capture_tuned
from portllm.progress import Progress, silent

BELOW_NOISE = "its change is not above the rounding noise of the two files"
NOISE = "edge of the rounding of both files, step^2/12 an element"


@dataclass(frozen=True, slots=True)
class CapturedTensor:
    """What became of one changed tensor.

    Attributes:
        base_sq: |W0|².
        difference_sq: |D|², for D = tuned - base.
        rank: Of the delta; None for a tensor that is kept whole or left out.
        residual_sq: |D - B A|², what the delta leaves out.
        noise_edge: Singular values of D below it are rounding.
    """

    base_sq: float
    difference_sq: float
    rank: int | None = None
    residual_sq: float = 0.0
    noise_edge: float = 0.0

    @property
    def relative_size(self) -> float:
        """`|D| / |W0|`; of what a base of zero became, `|D|` itself, so that it is a number that JSON holds."""
        return math.sqrt(self.difference_sq / self.base_sq) if self.base_sq else math.sqrt(self.difference_sq)

    @property
    def truncation_residual(self) -> float:
        """`|D - B A| / |D|`; 0.0 for a difference of zero."""
        return math.sqrt(self.residual_sq / self.difference_sq) if self.difference_sq else 0.0


@dataclass(frozen=True, slots=True)
class TunedReport:
    """What a capture from two checkpoints found.

    Attributes:
        record: The content of the new `patch.json`.
        deltas: By module, what has become a low-rank delta.
        values: By tensor, what is kept whole.
        left_out: By tensor, the norm of the change that the patch does not hold, relative to the base's tensor.
        reasons: Why they were left out.
        n_unchanged: Tensors that are the same in both.
    """

    record: PatchRecord
    deltas: Mapping[str, CapturedTensor]
    values: Mapping[str, CapturedTensor]
    left_out: Mapping[str, float]
    reasons: Mapping[str, str]
    n_unchanged: int

    @property
    def truncation_residual(self) -> float:
        """`|D - B A| / |D|` over all deltas together."""
        difference_sq = math.fsum(tensor.difference_sq for tensor in self.deltas.values())
        residual_sq = math.fsum(tensor.residual_sq for tensor in self.deltas.values())
        return math.sqrt(residual_sq / difference_sq) if difference_sq else 0.0


def capture_tuned(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    out: Path,
    rank: int | None = None,
    max_rank: int | None = None,
    dense: Dense = "keep",
    overwrite: bool = False,
    progress: Progress = silent,
) -> TunedReport:
    """Write to `out` the patch that leads from `base` to `tuned`, a folder that PEFT loads.

    Args:
        base: What fine-tuning started from.
        tuned: What it ended in.
        out: The patch's folder.
        rank: Of every delta; None keeps the singular values above the edge of the two files' rounding noise.
        max_rank: Bounds the rank where `rank` is None.
        dense: Keep norms, biases, embeddings and heads whole, or leave them out.
        overwrite: Replace `out` where it exists.
        progress: Told of the bytes of both models that are compared.

    Raises:
        PlanRefusedError: The models do not go together, or nothing is left to write.
        NonFiniteError: A weight holds an infinity or NaN.
        OutputExistsError: `out` exists.
        OutputError: `out` cannot be written, or holds what is read.
    """
    plan = plan_capture_tuned(base, tuned, rank=rank, max_rank=max_rank, dense=dense)
    return run_capture_tuned(plan, out, overwrite=overwrite, progress=progress)


def run_capture_tuned(
    plan: TunedPlan, out: Path, *, overwrite: bool = False, progress: Progress = silent
) -> TunedReport:
    """Carry out a plan; see `capture_tuned`."""
    if plan.refusals:
        raise PlanRefusedError(plan.refusals)
    if plan.base.is_remote or plan.tuned.is_remote:
        check_free(out, overwrite=overwrite)
        here = (on_disk(checkpoint, progress=progress) for checkpoint in (plan.base, plan.tuned))
        plan = plan_capture_tuned(*here, rank=plan.rank, max_rank=plan.max_rank, dense=plan.dense)
    check_apart(out, (*plan.base.files, *plan.tuned.files))
    with staged_folder(out, overwrite=overwrite) as folder, one_thread():
        with Spool(folder / SPOOL_FILE) as spool:
            report = _capture(plan, folder, spool, progress)
        return replace(report, record=write_record(folder, report.record))


def _capture(plan: TunedPlan, folder: Path, spool: Spool, progress: Progress) -> TunedReport:
    digests = [tensor_digests(checkpoint, progress=progress) for checkpoint in (plan.base, plan.tuned)]
    changed = {name: pair for name, pair in plan.pairs.items() if not _is_equal(pair, *digests)}
    changed_experts = {name: pair for name, pair in plan.experts.items() if not are_equal(pair, *digests)}
    found = _Found({}, {}, {}, {})
    factors: dict[str, LowRankDelta[TensorInfo]] = {}
    values: dict[str, TensorInfo] = {}
    experts: dict[str, ExpertsDelta[TensorInfo]] = {}
    n_unchanged = len(plan.pairs) + len(plan.experts) - len(changed) - len(changed_experts)
    total = sum(_n_bytes(pair) for pair in changed.values()) + sum(pair.n_bytes for pair in changed_experts.values())
    done = 0
    for name, pair in changed.items():
        if pair.module is not None:
            captured, measured = _capture_linear(pair, plan)
            if captured.delta is None:
                found.leave_out(name, measured, BELOW_NOISE)
            else:
                found.deltas[pair.module] = measured
                factors[pair.module] = _spooled(captured.delta, name, spool, transposed=pair.transposed)
        else:
            values |= _capture_whole(name, pair, plan, spool, found)
        done += _n_bytes(pair)
        progress(f"capture: {name}", done, total, "bytes")
    for name, experts_pair in changed_experts.items():
        delta, total_of, base_sq = capture_experts(name, experts_pair, rank=plan.rank, max_rank=plan.max_rank)
        measured = _measured(total_of, base_sq, None if delta is None else delta.rank)
        if not total_of.difference_sq:  # stored otherwise, so that their digests did not show it
            n_unchanged += 1
        elif delta is None:
            found.leave_out(name, measured, BELOW_NOISE)
        else:
            found.deltas[name] = measured
            a, b = spool.add(f"{name}.lora_A", delta.a), spool.add(f"{name}.lora_B", delta.b)
            experts[name] = ExpertsDelta(a=a, b=b, scale=1.0, rank=delta.rank)
        done += experts_pair.n_bytes
        progress(f"capture: {name}", done, total, "bytes")
    placed = place_values(values, tensors=plan.pairs, targets=factors, tied=plan.tied)
    for name, reason in placed.left_out.items():
        found.leave_out(name, found.values.pop(name), reason)
    if not factors and not experts:
        raise PlanRefusedError([_nothing(plan, found)])
    stored = {
        stored_name(key): WholeValue(values.get(name, plan.pairs[name].tuned)) for key, name in placed.keys.items()
    }
    fields = {"fan_in_fan_out": any(delta.transposed for delta in factors.values()), **placed.fields}
    config = AdapterConfig(_configured(plan, factors, experts, fields))
    patch = Patch(plan.tuned.name, dict(sorted(factors.items())), config, None, values=stored, experts=experts)
    write_patch(folder, patch, base_name=plan.base.name, base_revision=plan.base.revision)
    return _report(plan, patch, found, digests, n_unchanged=n_unchanged)


def _configured(
    plan: TunedPlan,
    factors: Mapping[str, LowRankDelta[TensorInfo]],
    experts: Mapping[str, ExpertsDelta[TensorInfo]],
    fields: Mapping[str, object],
) -> dict[str, object]:
    """The configuration; the router of experts is no linear module of PEFT's, but a parameter as they are."""
    family = family_of(plan.base.config)
    routers = [] if family is None or not family.experts else [name for name in factors if not family.is_linear(name)]
    ranks = {module: delta.rank for module, delta in factors.items() if module not in routers}
    parameters = {module + WEIGHT: factors[module].rank for module in routers}
    parameters |= {name: delta.rank for name, delta in experts.items()}
    return canonical_config(ranks, parameters=parameters, fields=fields)


@dataclass(frozen=True, slots=True)
class _Found:
    """What was found so far; see `TunedReport`."""

    deltas: dict[str, CapturedTensor]
    values: dict[str, CapturedTensor]
    left_out: dict[str, float]
    reasons: dict[str, str]

    def leave_out(self, name: str, measured: CapturedTensor, reason: str) -> None:
        self.left_out[name] = _rounded(measured.relative_size)
        self.reasons[name] = reason


def _capture_linear(pair: Pair, plan: TunedPlan) -> tuple[Captured, CapturedTensor]:
    """The low-rank delta of one linear weight."""
    shape = (pair.base.shape[0], pair.base.shape[1])
    noise = RoundingNoise(shape)
    difference: Tensor | None = None
    base_sq = 0.0
    for start, base, tuned in _row_blocks(pair):
        dtype = working_dtype(base, tuned)
        if difference is None:
            difference = torch.empty(shape, dtype=dtype)
        difference[start : start + len(base)] = tuned.to(dtype) - base.to(dtype)
        base_sq += square_sum(base)
        noise.add_rows(start, base, tuned)
    if difference is None:  # a matrix without rows
        difference = torch.empty(shape)
    _require_finite(pair, difference)
    captured = truncate(difference, rank=plan.rank, edge=noise.edge, max_rank=plan.max_rank)
    return captured, _measured(captured, base_sq, captured.rank)


def _measured(captured: Captured, base_sq: float, rank: int | None) -> CapturedTensor:
    return CapturedTensor(base_sq, captured.difference_sq, rank, captured.residual_sq, captured.noise_edge)


def _capture_whole(name: str, pair: Pair, plan: TunedPlan, spool: Spool, found: _Found) -> dict[str, TensorInfo]:
    """The tuned value of a tensor that is no linear weight, measured; nothing where it is left out."""
    base_sq = difference_sq = 0.0
    with spool.writing(name, pair.tuned.dtype, pair.base.shape) as entry:
        for _, base, tuned in _row_blocks(pair):
            dtype = working_dtype(base, tuned)
            base_sq += square_sum(base)
            difference_sq += square_sum(tuned.to(dtype) - base.to(dtype))
            if pair.row_map is not None and plan.dense == "keep":
                entry.append(encode(tuned))
    measured = CapturedTensor(base_sq, difference_sq)
    if not math.isfinite(base_sq + difference_sq):
        _require_finite(pair, torch.tensor(math.inf))
    if pair.row_map is not None and pair.row_map.extra:
        extra = CapturedTensor(base_sq, _rows_square_sum(pair.tuned, pair.row_map.extra))
        found.leave_out(f"{name}[{len(pair.row_map.extra)} rows]", extra, "tokens that the base does not have")
    if not difference_sq:
        return {}
    if plan.dense == "drop":
        found.leave_out(name, measured, "it is no linear weight, and --dense drop leaves those out")
        return {}
    found.values[name] = measured
    return {name: pair.tuned if pair.row_map is None else entry.info}


def _row_blocks(pair: Pair) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Rows of both as they are stored, two axes each, with the number of the first; a scalar is one row."""
    rows = pair.base.shape[0] if pair.base.shape else 1
    width = max(1, pair.base.n_params // max(1, rows))
    step = max(1, BLOCK_ELEMENTS // width)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        base = load_rows(pair.base, start, stop).reshape(stop - start, -1)
        if pair.row_map is None:
            tuned = load_rows(pair.tuned, start, stop).reshape(stop - start, -1)
        else:
            tuned = _rows_by_token(base, pair, pair.row_map, start)
        yield start, base, tuned


def _rows_by_token(base: Tensor, pair: Pair, row_map: RowMap, start: int) -> Tensor:
    """Tuned's rows in base's order; where tuned has no such token, base's own row."""
    wanted = row_map.rows[start : start + len(base)]
    # Values of tuned, so its dtype: base's own rows are rounded where that is the narrower one.
    rows = base.to(TORCH_DTYPES[pair.tuned.dtype], copy=True)
    for first, last in runs(wanted):
        if wanted[first] >= 0:
            rows[first:last] = load_rows(pair.tuned, wanted[first], wanted[first] + last - first)
    return rows


def _rows_square_sum(info: TensorInfo, rows: tuple[int, ...]) -> float:
    return math.fsum(square_sum(load_rows(info, rows[a], rows[a] + b - a)) for a, b in runs(rows))


def _spooled(delta: LowRankDelta[Tensor], name: str, spool: Spool, *, transposed: bool) -> LowRankDelta[TensorInfo]:
    # Of a weight that is stored as (d_in, d_out) the factors of the transpose are kept, as PEFT does.
    a, b = (delta.b.T.contiguous(), delta.a.T.contiguous()) if transposed else (delta.a, delta.b)
    return LowRankDelta(
        a=spool.add(f"{name}.lora_A", a.float()),
        b=spool.add(f"{name}.lora_B", b.float()),
        scale=1.0,
        transposed=transposed,
    )


def _report(
    plan: TunedPlan,
    patch: Patch[TensorInfo],
    found: _Found,
    digests: list[dict[str, str]],
    *,
    n_unchanged: int,
) -> TunedReport:
    base, tuned = (
        replace(identity, digest=digest_of(known, own_tensors(checkpoint)))
        for identity, known, checkpoint in zip(
            (plan.source, plan.target), digests, (plan.base, plan.tuned), strict=True
        )
    )
    settings: dict[str, object] = {
        "rank": "auto" if plan.rank is None else plan.rank,
        "dense": plan.dense,
        "tuned": asdict(tuned),
        "noise": NOISE,
    }
    if plan.rank is None and plan.max_rank is not None:
        settings["max_rank"] = plan.max_rank
    left_out = dict(sorted(found.left_out.items()))
    blank = PatchRecord(base, Capture("tuned"), (), digest_tensors(patch), __version__)
    report = TunedReport(blank, found.deltas, found.values, left_out, found.reasons, n_unchanged)
    settings |= {"truncation_residual": _rounded(report.truncation_residual), "left_out": left_out}
    record = PatchRecord(base, Capture("tuned", settings), (), blank.tensors, __version__)
    return TunedReport(record, found.deltas, found.values, left_out, found.reasons, n_unchanged)


def _nothing(plan: TunedPlan, found: _Found) -> Refusal:
    if not found.left_out and not found.values:
        return Refusal("--tuned", f"{plan.tuned.name} and {plan.base.name} have the same values: there is no patch.")
    return Refusal(
        "--tuned",
        f"{len(found.left_out) + len(found.values)} tensors differ from {plan.base.name}, but no linear weight by more "
        "than the rounding noise of the two files, and PEFT loads no adapter without a delta. --rank 1 takes the "
        "largest direction of each, noise or not.",
    )


def _is_equal(pair: Pair, base: Mapping[str, str], tuned: Mapping[str, str]) -> bool:
    same_kind = (pair.base.dtype, pair.base.shape) == (pair.tuned.dtype, pair.tuned.shape)
    return same_kind and base[pair.base.name] == tuned[pair.tuned.name]


def _require_finite(pair: Pair, difference: Tensor) -> None:
    if not difference.isfinite().all():
        raise not_finite(pair.base.name)


def _n_bytes(pair: Pair) -> int:
    return pair.base.n_bytes + pair.tuned.n_bytes


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
