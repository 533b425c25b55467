"""Add a patch to a model's weights, streamed: plan, then one tensor after another, in blocks of rows.

Memory holds one block at a time, whatever the size of the model. What the patch does not touch is copied as bytes.
The digests of what is read and written are taken on the way. A run that was interrupted or died is gone on with by the
next run of the same plan, from the file it had reached.
"""

import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

from blake3 import blake3

from portllm import __version__
from portllm.checkpoint.header import TensorInfo
from portllm.checkpoint.identity import digest_of, digest_tensor, fingerprint, own_tensors, remember
from portllm.checkpoint.reader import Checkpoint, on_disk, open_checkpoint, read_header
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
from portllm.patch.rounding import MergeSums
from portllm.pipeline.blocks import NEAREST, Rounding, Stochastic, blocks_of
from portllm.pipeline.plan import MergePlan, plan_merge, require
from portllm.progress import Progress, silent


def merge(
    patch: Patch[TensorInfo],
    *,
    into: Checkpoint,
    out: Path,
    dtype: str | None = None,
    rounding: Rounding = NEAREST,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
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
        shard_bytes: Size above which the output is split into shards.
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
    """
    plan = plan_merge(patch, into=into, dtype=dtype, shard_bytes=shard_bytes, allow_other_base=allow_other_base)
    return run_merge(plan, out, rounding=rounding, overwrite=overwrite, progress=progress)


def run_merge(
    plan: MergePlan,
    out: Path,
    *,
    rounding: Rounding = NEAREST,
    overwrite: bool = False,
    progress: Progress = silent,
) -> MergeReport:
    """Carry out a plan; see `merge`."""
    require(replace(plan, refusals=(*plan.refusals, *space_refusals(out, plan.n_bytes))))
    if isinstance(rounding, Stochastic):
        _require_bfloat16(plan)
    check_free(out, overwrite=overwrite)
    plan = _on_disk(plan, progress)
    check_apart(out, (*plan.into.files, *files_of(plan.patch)))
    if plan.into.folder is not None:
        side_files(plan.into.folder)  # refuses what must not be copied, before there is any work to lose
    done = 0

    def wrote(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress("merge", done, plan.n_bytes, "bytes")

    total = _Facts()
    with resumable_folder(out, overwrite=overwrite, plan=_digest_plan(plan, rounding)) as staged:
        known = {shard.file: facts for shard in plan.shards if (facts := _finished(staged, shard)) is not None}
        staged.keep(known)
        for shard in plan.shards:
            facts = known.get(shard.file)
            if facts is None:
                facts = _write_shard(plan, shard, staged.folder, rounding, wrote)
                staged.finish(shard.file, facts.to_json())
            else:
                wrote(sum(entry.n_bytes for entry in shard.entries))
            total.add(facts)
        write_index(staged.folder, plan.shards)
        if plan.into.folder is not None:
            copy_side_files(plan.into.folder, staged.folder, config_changes=plan.config_changes)
        report = _report(plan, out, staged.folder, rounding, total)
        write_manifest(staged.folder, report, program=__version__)
    _remember_digests(plan.into, total.read)
    _remember_digests(open_checkpoint(out), total.written)
    return report


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is known of finished files, by tensor: digests of what was read and written, and what rounding took."""

    read: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    sums: dict[str, MergeSums] = field(default_factory=dict)

    def add(self, other: "_Facts") -> None:
        self.read.update(other.read)
        self.written.update(other.written)
        self.sums.update(other.sums)

    def to_json(self) -> dict[str, object]:
        return {
            "read": self.read,
            "written": self.written,
            "sums": {name: astuple(sums) for name, sums in self.sums.items()},
        }

    @staticmethod
    def from_json(values: Mapping[str, object]) -> "_Facts":
        match values:
            case {"read": dict(read), "written": dict(written), "sums": dict(sums)}:
                return _Facts(read, written, {name: MergeSums(*numbers) for name, numbers in sums.items()})
            case _:
                raise ValueError("these are not the facts of a merge")


def _write_shard(
    plan: MergePlan, shard: Shard, folder: Path, rounding: Rounding, wrote: Callable[[int], None]
) -> _Facts:
    facts = _Facts()
    with ShardWriter(folder, shard) as writer:
        for entry in shard.entries:
            read, written = blake3(), blake3()
            for block in blocks_of(plan.steps[entry.name], rounding):
                writer.append(block.data)
                read.update(block.source)
                written.update(block.data)
                if block.sums is not None:
                    facts.sums[entry.name] = facts.sums.get(entry.name, MergeSums()) + block.sums
                wrote(len(block.data))
            facts.read[plan.steps[entry.name].source.name] = read.hexdigest()
            facts.written[entry.name] = written.hexdigest()
    return facts


def _finished(staged: Staged, shard: Shard) -> _Facts | None:
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
    facts = _Facts.from_json(staged.finished[shard.file])
    return facts if facts.written == written else None


def _digest_plan(plan: MergePlan, rounding: Rounding) -> str:
    """A digest of all that the bytes of the weights depend on; the model's files count by size and time of change."""
    facts = [file.stat() for file in plan.into.files if isinstance(file, Path)]
    inputs = {
        "programs": {name: importlib.metadata.version(name) for name in ("portllm", "torch")},
        "into": [plan.identity.fingerprint, [[fact.st_size, fact.st_mtime_ns] for fact in facts]],
        "patch": [digest_tensors(plan.patch), plan.patch.config.fields],
        "rounding": str(rounding),
        "shards": [[shard.file, [[e.name, e.dtype, e.shape] for e in shard.entries]] for shard in plan.shards],
    }
    return blake3(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


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
    rounding: Rounding,
    facts: _Facts,
) -> MergeReport:
    written = open_checkpoint(folder)
    return MergeReport(
        output=ModelIdentity(out.name, fingerprint(written), digest_of(facts.written, own_tensors(written))),
        into=replace(plan.identity, digest=digest_of(facts.read, own_tensors(plan.into))),
        patch=plan.patch.record,
        dtype=tuple(sorted({plan.steps[name].entry.dtype for name in facts.sums})),
        rounding=str(rounding),
        tensors=facts.sums,
        n_copied=len(plan.steps) - plan.n_changed,
        n_bytes=plan.n_bytes,
        files=digest_side_files(folder),
    )


def _remember_digests(checkpoint: Checkpoint, digests: Mapping[str, str]) -> None:
    for file in checkpoint.files:
        names = [info.name for info in checkpoint.infos.values() if info.file == file]
        # A stored copy of a tied embedding is not read when the patch gives the output a head of its own.
        if all(name in digests for name in names):
            remember(file, {name: digests[name] for name in names})


def _require_bfloat16(plan: MergePlan) -> None:
    other = next((step.entry for step in plan.steps.values() if step.change and step.entry.dtype != "BF16"), None)
    if other is not None:
        raise UnsupportedDtypeError(
            f"'{other.name}': is to be stored as {other.dtype}; stochastic rounding is for BF16. Store BF16, or round "
            "to nearest."
        )
