"""Capture a patch from two checkpoints: the difference of each pair of tensors, truncated to a rank.

Each worker takes one tensor after another and holds one dense difference, in float32, whatever the size of the models;
what it found goes to disk. Every file is read once, tensors that are known to be equal not at all.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from msgspec import structs

from portllm import __version__
from portllm.capturing.experts import are_equal, compare_experts
from portllm.capturing.tensor import CapturedTensor, Compared, Known, compare_linear, compare_whole
from portllm.capturing.tuned_plan import Dense, TunedPlan, plan_capture_tuned
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import are_stored_alike, require_equal
from portllm.checkpoint.model.identity import digest_of, digest_stored, known_digests, remember_digests
from portllm.checkpoint.open import on_disk
from portllm.errors import Refusal, refuse
from portllm.files.output_folder import check_free, staged_folder
from portllm.patch.adapter_config import AdapterConfig
from portllm.patch.adapter_folder import digest_tensors, load_patch, write_patch, write_record
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.card import write_patch_card
from portllm.patch.delta import ExpertsDelta, LowRankDelta, WholeValue
from portllm.patch.identify import identity_of_base
from portllm.patch.new_adapter import canonical_config, place_values, stored_name
from portllm.patch.patch import Patch
from portllm.patch.record import Capture, PatchRecord
from portllm.progress import Progress, silent
from portllm.tensors.info import TensorInfo
from portllm.tensors.spool import SPOOL_FILE, Spool
from portllm.workers.one_thread import one_thread_each

TASKS = {"seq2seq": "SEQ_2_SEQ_LM", "sequence": None, "token": None}
"""What PEFT calls what a class is loaded for, where it is not to continue a text.

Of a classifier that it is told of, PEFT demands that the adapter have the head.
"""

BELOW_NOISE = "its change does not exceed the rounding noise of the two files"
DROPPED = "it is not a linear weight, and --dense drop leaves those out"
NOISE = "upper edge of the rounding noise of both files, step^2/12 per element"

MEMORY_BYTES = 1 << 31
"""What the dense differences that are in memory at once may take together; one of them may be larger."""


@dataclass(frozen=True, slots=True)
class TunedReport:
    """Report of a capture from two checkpoints.

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

    def __repr__(self) -> str:
        found = f"{len(self.deltas)} deltas, {len(self.values)} values, {len(self.left_out)} left out"
        return f"TunedReport({found}, truncation_residual={self.truncation_residual:.3g})"

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
    settings: Mapping[str, object] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> TunedReport:
    """Write to `out` the patch that leads from `base` to `tuned`; arguments and errors as for `capture`.

    `settings` are what else the record says of it, such as how prompts are made.
    """
    plan = plan_capture_tuned(base, tuned, rank=rank, max_rank=max_rank, dense=dense)
    return run_capture_tuned(plan, out, settings=settings, overwrite=overwrite, progress=progress)


def run_capture_tuned(
    plan: TunedPlan,
    out: Path,
    *,
    settings: Mapping[str, object] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> TunedReport:
    """Carry out a plan; see `capture_tuned`."""
    refuse(plan.refusals)
    if plan.base.is_remote or plan.tuned.is_remote:
        check_free(out, overwrite=overwrite)
        here = (on_disk(checkpoint, progress=progress) for checkpoint in (plan.base, plan.tuned))
        plan = plan_capture_tuned(*here, rank=plan.rank, max_rank=plan.max_rank, dense=plan.dense)
    inputs = (*plan.base.files, *plan.tuned.files)
    with staged_folder(out, overwrite=overwrite, inputs=inputs) as folder:
        require_equal((*plan.base.stored_twice, *plan.tuned.stored_twice, *plan.taken), progress=progress)
        with Spool(folder / SPOOL_FILE) as spool:
            report = _capture(plan, folder, spool, progress)
        capture = report.record.capture
        capture = structs.replace(capture, settings={**capture.settings, **(settings or {})})
        record = write_record(folder, structs.replace(report.record, capture=capture))
        write_patch_card(folder, load_patch(folder), record, own=None, base=plan.base)
        return replace(report, record=record)


def _capture(plan: TunedPlan, folder: Path, spool: Spool, progress: Progress) -> TunedReport:
    known = known_digests(plan.base), known_digests(plan.tuned)
    found = _Found((dict(known[0]), dict(known[1])))
    for pair in plan.taken:
        for side, info in enumerate((pair.left, pair.right)):
            found.digests[side].update(digest_stored(info, known[side]))
    for name, compared in _compare(plan, spool, known, progress):
        found.take(name, compared, plan)
    for checkpoint, digests in zip((plan.base, plan.tuned), found.digests, strict=True):
        remember_digests(checkpoint, digests)
    placed = place_values(
        found.kept, tensors=plan.pairs, targets=found.factors, tied=plan.tied, head=plan.base.head_name
    )
    for name, reason in placed.left_out.items():
        found.leave_out(name, found.values.pop(name), reason)
    if not found.factors and not found.experts:
        refuse([_nothing(plan, found)])
    stored = {
        stored_name(key): WholeValue(found.kept.get(name, plan.pairs[name].tuned)) for key, name in placed.keys.items()
    }
    fields = {"fan_in_fan_out": any(delta.transposed for delta in found.factors.values()), **placed.fields}
    config = AdapterConfig(_configured(plan, found.factors, found.experts, fields))
    factors = dict(sorted(found.factors.items()))
    patch = Patch(plan.tuned.name, factors, config, None, values=stored, experts=found.experts)
    write_patch(folder, patch, base_name=plan.base.name, base_revision=plan.base.revision)
    return _report(plan, patch, found)


def _compare(plan: TunedPlan, spool: Spool, known: Known, progress: Progress) -> Iterator[tuple[str, Compared]]:
    """What was found of each tensor that is not known to be the same in both, in order; several are read at a time."""
    sizes = {
        name: pair.n_bytes for name, pair in plan.pairs.items() if not are_stored_alike(pair.base, pair.tuned, *known)
    }
    sizes |= {name: pair.n_bytes for name, pair in plan.experts.items() if not are_equal(pair, *known)}

    def compare(name: str) -> Compared:
        if name in plan.experts:
            return compare_experts(name, plan, known=known, spool=spool)
        if plan.pairs[name].module is None:
            return compare_whole(name, plan.pairs[name], dense=plan.dense, known=known, spool=spool)
        how = {"rank": plan.rank, "max_rank": plan.max_rank}
        return compare_linear(name, plan.pairs[name], **how, known=known, spool=spool)

    done, total = 0, sum(sizes.values())
    with one_thread_each(MEMORY_BYTES // max(1, _largest(plan))) as workers:
        for name, compared in zip(sizes, workers.map(compare, sizes), strict=True):
            done += sizes[name]
            progress(f"capture: {name}", done, total, "bytes")
            yield name, compared


def _largest(plan: TunedPlan) -> int:
    """Bytes of the largest difference in float32; each worker holds one."""
    pairs = [pair.base.n_params for pair in plan.pairs.values() if pair.module is not None]
    # An expert's weights of both models are in memory too.
    experts = [3 * math.prod(pair.shape) for pair in plan.experts.values()]
    return 4 * max([*pairs, *experts], default=0)


def _configured(
    plan: TunedPlan,
    factors: Mapping[str, LowRankDelta[TensorInfo]],
    experts: Mapping[str, ExpertsDelta[TensorInfo]],
    fields: Mapping[str, object],
) -> dict[str, object]:
    """The configuration; the router of experts is no linear module of PEFT's, but a parameter as they are."""
    routers = [name for name in factors if plan.base.expert_parts and not plan.base.is_linear(name)]
    ranks = {module: delta.rank for module, delta in factors.items() if module not in routers}
    parameters = {module + WEIGHT: factors[module].rank for module in routers}
    parameters |= {name: delta.rank for name, delta in experts.items()}
    task = "causal" if plan.base.family is None else plan.base.family.task
    fields = {"task_type": TASKS.get(task, "CAUSAL_LM"), **fields}
    return canonical_config(ranks, parameters=parameters, fields=fields)


@dataclass(frozen=True, slots=True)
class _Found:
    """What was found so far; see `TunedReport`.

    Attributes:
        digests: Of all tensors that were read.
        factors: By module.
        experts: By tensor.
        kept: What replaces the base's tensor, by its name.
    """

    digests: tuple[dict[str, str], dict[str, str]]
    factors: dict[str, LowRankDelta[TensorInfo]] = field(default_factory=dict)
    experts: dict[str, ExpertsDelta[TensorInfo]] = field(default_factory=dict)
    kept: dict[str, TensorInfo] = field(default_factory=dict)
    deltas: dict[str, CapturedTensor] = field(default_factory=dict)
    values: dict[str, CapturedTensor] = field(default_factory=dict)
    left_out: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def take(self, name: str, compared: Compared, plan: TunedPlan) -> None:
        """Put what was found of a tensor where it belongs."""
        for mine, new in zip(self.digests, compared.digests, strict=True):
            mine.update(new)
        if compared.extra is not None:
            self.changed.add(name)
            n_rows = len(plan.pairs[name].extra_rows)
            self.leave_out(f"{name}[{n_rows} rows]", compared.extra, "tokens that the base does not have")
        if not compared.measured.difference_sq:
            return
        self.changed.add(name)
        match compared.delta:
            case _ if name in plan.absent:
                self.leave_out(name, compared.measured, plan.absent[name])
            case LowRankDelta() as delta:
                module = name.removesuffix(WEIGHT)
                self.deltas[module], self.factors[module] = compared.measured, delta
            case ExpertsDelta() as delta:
                self.deltas[name], self.experts[name] = compared.measured, delta
            case None if name in plan.experts or plan.pairs[name].module is not None:
                self.leave_out(name, compared.measured, BELOW_NOISE)
            case None if plan.dense == "drop" or compared.value is None:
                self.leave_out(name, compared.measured, DROPPED)
            case None:
                self.values[name], self.kept[name] = compared.measured, compared.value

    def leave_out(self, name: str, measured: CapturedTensor, reason: str) -> None:
        self.left_out[name] = _rounded(measured.relative_size)
        self.reasons[name] = reason


def _report(
    plan: TunedPlan,
    patch: Patch[TensorInfo],
    found: _Found,
) -> TunedReport:
    base, tuned = (
        structs.replace(identity, digest=digest_of(known, checkpoint))
        for identity, known, checkpoint in zip(
            (plan.source, plan.target), found.digests, (plan.base, plan.tuned), strict=True
        )
    )
    settings: dict[str, object] = {
        "rank": "auto" if plan.rank is None else plan.rank,
        "dense": plan.dense,
        "tuned": structs.asdict(tuned),
    }
    if plan.rank is None:
        settings["noise"] = NOISE
    if plan.rank is None and plan.max_rank is not None:
        settings["max_rank"] = plan.max_rank
    left_out = dict(sorted(found.left_out.items()))
    n_unchanged = len(plan.pairs) + len(plan.experts) - len(found.changed)
    base = identity_of_base(plan.base, base)
    blank = PatchRecord(__version__, base, Capture("tuned", {}), ports=(), tensors=digest_tensors(patch), files={})
    report = TunedReport(blank, found.deltas, found.values, left_out, found.reasons, n_unchanged)
    settings |= {"truncation_residual": _rounded(report.truncation_residual), "left_out": left_out}
    return replace(report, record=structs.replace(blank, capture=Capture("tuned", settings)))


def _nothing(plan: TunedPlan, found: _Found) -> Refusal:
    if not found.left_out and not found.values:
        return Refusal(
            "--tuned", f"{plan.tuned.name} and {plan.base.name} have identical values: there is nothing to capture."
        )
    return Refusal(
        "--tuned",
        f"{len(found.left_out) + len(found.values)} tensors differ from {plan.base.name}, but no linear weight by "
        "more than the rounding noise of the two files, and PEFT cannot load an adapter without a delta. --rank "
        "1 keeps the largest direction of each weight, noise or not.",
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
