"""Add a patch to a model's weights, streamed: plan, then the tensors, in blocks of rows.

Each thread takes a tensor through reading, arithmetic, digests and writing, so that disk and processors work at the
same time. Memory holds one block a thread, whatever the size of the model. What the patch does not touch is copied as
bytes. A run that was interrupted or died is gone on with by the next run of the same plan, from the file it had
reached.
"""

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from blake3 import blake3

from portllm import __version__
from portllm.checkpoint.header import TensorInfo
from portllm.checkpoint.identity import digest_of, digest_tensor, fingerprint, own_tensors, remember_digests
from portllm.checkpoint.page_cache import is_large
from portllm.checkpoint.raw_files import read_header
from portllm.checkpoint.reader import Checkpoint, on_disk, open_checkpoint
from portllm.checkpoint.staging import Staged
from portllm.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    Shard,
    ShardWriter,
    check_apart,
    check_free,
    resumable_folder,
    space_refusals,
    write_index,
)
from portllm.errors import CheckpointError, RemoteError, UnsupportedDtypeError
from portllm.output.manifest import MergeReport, digest_side_files, write_manifest
from portllm.output.side_files import copy_side_files, side_files
from portllm.patch.adapter_folder import digest_tensors, files_of
from portllm.patch.patch import Patch
from portllm.patch.record import ModelIdentity
from portllm.pipeline.blocks import NEAREST, Rounding, Stochastic
from portllm.pipeline.make_tensor import Facts, How, benches, make_tensor, require_device
from portllm.pipeline.one_thread import one_thread
from portllm.pipeline.plan import MergePlan, MergeStep, plan_merge, require
from portllm.pipeline.quantization_gap import measure_gap
from portllm.pipeline.side_by_side import Tell, run_side_by_side
from portllm.progress import Progress, silent


def merge(
    patch: Patch[TensorInfo],
    *,
    into: Checkpoint,
    out: Path,
    dtype: str | None = None,
    rounding: Rounding = NEAREST,
    device: str = "cpu",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    quantized_base: Checkpoint | None = None,
    allow_other_base: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> MergeReport:
    """Write the model `into` with a patch in its weights to the folder `out`.

    Each changed weight is `Q(W + s·B·A)`: the sum in float32, rounded once. For plain LoRA with nearest rounding the
    bytes equal those of PEFT's `merge_and_unload`. What is at `out` stays until the output is whole; a run that was
    interrupted or died leaves its finished files beside `out`, where the next one with the same arguments finds them.

    Args:
        patch: What to add.
        into: The model the patch belongs to; one of the hub is downloaded once the patch is known to fit it.
        out: The new model's folder.
        dtype: Storage dtype of the output (`F32`, `BF16`, `F16`, `F64`), or None to keep each tensor's.
        rounding: How the sum is brought to the storage dtype.
        device: Where the arithmetic is done, `cpu` or `cuda`; bytes are promised to equal PEFT's on the CPU only.
        shard_bytes: Size above which the output is split into shards.
        quantized_base: The quantized model that the patch belongs to, where `into` is what that was made from.
        allow_other_base: Go on though the patch belongs to another model.
        overwrite: Replace `out` where it exists.
        progress: Told of the bytes written.

    Returns:
        What was done, with kept gain and rounding loss of each tensor.

    Raises:
        PlanRefusedError: The patch does not fit, or the output not on the disk, with every reason.
        OutputExistsError: `out` exists.
        OutputBusyError: Another run writes to `out`.
        OutputError: `out` cannot be written, or holds what is read.
        NonFiniteError: A weight, a delta or a sum is infinite or not a number.
        UnsupportedDtypeError: `dtype` is not one that weights are stored in, or not one for this rounding.
        DeviceError: There is no such device here.
    """
    plan = plan_merge(
        patch,
        into=into,
        dtype=dtype,
        shard_bytes=shard_bytes,
        quantized_base=quantized_base,
        allow_other_base=allow_other_base,
    )
    return run_merge(plan, out, rounding=rounding, device=device, overwrite=overwrite, progress=progress)


def run_merge(
    plan: MergePlan,
    out: Path,
    *,
    rounding: Rounding = NEAREST,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = silent,
) -> MergeReport:
    """Carry out a plan; see `merge`."""
    how = How(rounding, require_device(device), keep_cached=not is_large(plan.n_bytes))
    require(replace(plan, refusals=(*plan.refusals, *space_refusals(out, plan.n_bytes))))
    if isinstance(rounding, Stochastic):
        require_bfloat16(plan)
    check_free(out, overwrite=overwrite)
    plan = _on_disk(plan, progress)
    check_apart(out, (*plan.into.files, *files_of(plan.patch)))
    if plan.into.folder is not None:
        side_files(plan.into.folder)  # refuses what must not be copied, before there is any work to lose
    total = Facts()
    with resumable_folder(out, overwrite=overwrite, plan=_digest_plan(plan, how)) as staged:
        known = {shard.file: facts for shard in plan.shards if (facts := _finished(staged, shard)) is not None}
        staged.keep(known)
        for facts in known.values():
            total.add(facts)
        left = [shard for shard in plan.shards if shard.file not in known]
        wrote = _count(plan.n_bytes, sum(entry.n_bytes for shard in left for entry in shard.entries), progress)
        total.add(_write_shards(plan, left, staged, how, wrote))
        write_index(staged.folder, plan.shards)
        if plan.into.folder is not None:
            copy_side_files(plan.into.folder, staged.folder, config_changes=plan.config_changes)
        report = _report(plan, out, staged.folder, how, total)
        if plan.fitted is not None:
            report = replace(report, quantization=measure_gap(plan, plan.fitted, total.sums, progress=progress))
        write_manifest(staged.folder, report, program=__version__)
    # A stored copy of a tied embedding is not read when the patch gives the output a head of its own.
    remember_digests(plan.into, total.read)
    remember_digests(open_checkpoint(out), total.written)
    return report


@dataclass(slots=True)
class _File:
    """A file that is being written, by threads that take a tensor each."""

    name: str
    writer: ShardWriter
    missing: int
    facts: Facts = field(default_factory=Facts)


def _write_shards(
    plan: MergePlan, shards: Sequence[Shard], staged: Staged, how: How, told: Callable[[int], None]
) -> Facts:
    """Write files; what is known of a file is noted as soon as it is on the disk, while the next ones are written."""
    total = Facts()
    files: list[_File] = []

    def job(file: _File, step: MergeStep, tell: Tell) -> tuple[_File, Facts]:
        bench = free.get()
        try:
            return file, make_tensor(step, bench, partial(file.writer.write, step.entry.name), tell)
        finally:
            free.put(bench)

    def jobs() -> Iterator[Callable[[Tell], tuple[_File, Facts]]]:
        for shard in shards:
            writer = ShardWriter(staged.folder, shard, keep_cached=how.keep_cached)
            files.append(_File(shard.file, writer, len(shard.entries)))
            yield from (partial(job, files[-1], plan.steps[entry.name]) for entry in shard.entries)

    def done(made: tuple[_File, Facts]) -> None:
        file, facts = made
        file.facts.add(facts)
        file.missing -= 1
        if not file.missing:
            file.writer.close()
            staged.finish(file.name, file.facts.to_json())
            total.add(file.facts)

    with one_thread(), benches(how) as free:
        try:
            run_side_by_side(jobs(), threads=how.threads, told=told, done=done)
        finally:
            for file in files:
                file.writer.abandon()
    return total


def _count(total: int, left: int, progress: Progress) -> Callable[[int], None]:
    """Tells `progress` of the bytes written, those of an earlier run included."""
    done = total - left

    def wrote(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress("merge", done, total, "bytes")

    if done:
        wrote(0)
    return wrote


def _finished(staged: Staged, shard: Shard) -> Facts | None:
    """What an earlier run noted about a file, if the file still has every byte that the run wrote."""
    if shard.file not in staged.finished:
        return None
    file = staged.folder / shard.file
    try:
        with open(file, "rb") as stream:
            if stream.read(len(shard.header)) != shard.header:
                return None
        written = {name: digest_tensor(info) for name, info in read_header(file).tensors.items()}
    except (OSError, CheckpointError):
        return None
    facts = Facts.from_json(staged.finished[shard.file])
    return facts if facts.written == written else None


def _digest_plan(plan: MergePlan, how: How) -> str:
    """A digest of all that the bytes of the weights depend on; the model's files count by size and time of change."""
    facts = [file.stat() for file in plan.into.files if isinstance(file, Path)]
    files = [[fact.st_size, fact.st_mtime_ns] for fact in facts]
    inputs = {**digest_inputs(plan, how), "into": [plan.identity.fingerprint, files]}
    return blake3(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def digest_inputs(plan: MergePlan, how: How) -> dict[str, object]:
    """All that the bytes of the weights depend on, but for the model's own bytes."""
    return {
        "programs": {name: importlib.metadata.version(name) for name in ("portllm", "torch")},
        "patch": [digest_tensors(plan.patch), plan.patch.config.fields],
        "rounding": str(how.rounding),
        "device": how.device,
        "shards": [[shard.file, [[e.name, e.dtype, e.shape] for e in shard.entries]] for shard in plan.shards],
    }


def _on_disk(plan: MergePlan, progress: Progress) -> MergePlan:
    """The same plan with the weights to read on disk."""
    into = on_disk(plan.into, progress=progress)
    if into is plan.into:
        return plan
    if fingerprint(into) != plan.identity.fingerprint:
        raise RemoteError(
            f"'{into.folder}': is not what {into.name} is on the hub: its fingerprint differs from "
            f"{plan.identity.fingerprint}. Delete it and run again."
        )
    steps = {name: replace(step, source=into.infos[step.source.name]) for name, step in plan.steps.items()}
    return replace(plan, into=into, steps=steps)


def _report(
    plan: MergePlan,
    out: Path,
    folder: Path,
    how: How,
    facts: Facts,
) -> MergeReport:
    written = open_checkpoint(folder)
    return MergeReport(
        output=ModelIdentity(out.name, fingerprint(written), digest_of(facts.written, own_tensors(written))),
        into=replace(plan.identity, digest=digest_of(facts.read, own_tensors(plan.into))),
        patch=plan.patch.record,
        dtype=tuple(sorted({plan.steps[name].entry.dtype for name in facts.sums})),
        rounding=str(how.rounding),
        device=how.device,
        tensors=dict(sorted(facts.sums.items())),
        n_copied=len(plan.steps) - plan.n_changed,
        n_bytes=plan.n_bytes,
        files=digest_side_files(folder),
    )


def require_bfloat16(plan: MergePlan) -> None:
    """Raise UnsupportedDtypeError if a changed tensor is not to be stored as bfloat16, for stochastic rounding."""
    other = next((step.entry for step in plan.steps.values() if step.change and step.entry.dtype != "BF16"), None)
    if other is not None:
        raise UnsupportedDtypeError(
            f"'{other.name}': is to be stored as {other.dtype}; stochastic rounding is for BF16. Store BF16, or round "
            "to nearest."
        )
