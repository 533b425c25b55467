"""Add a patch to a model's weights, streamed: plan, then one tensor after another, in blocks of rows.

Memory holds one block at a time, whatever the size of the model. What the patch does not touch is copied as bytes.
The digests of what is read and written are taken on the way.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from blake3 import blake3

from portllm import __version__
from portllm.checkpoint.header import TensorInfo
from portllm.checkpoint.identity import digest_of, fingerprint, own_tensors, remember
from portllm.checkpoint.reader import Checkpoint, on_disk, open_checkpoint
from portllm.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    ShardWriter,
    check_apart,
    check_free,
    staged_folder,
    write_index,
)
from portllm.errors import RemoteError, UnsupportedDtypeError
from portllm.output.manifest import MergeReport, write_manifest
from portllm.output.side_files import copy_side_files
from portllm.patch.adapter_folder import files_of
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
    bytes equal those of PEFT's `merge_and_unload`.

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
        PlanRefusedError: The patch does not fit, with every reason.
        OutputExistsError: `out` exists.
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
    require(plan)
    if isinstance(rounding, Stochastic):
        _require_bfloat16(plan)
    check_free(out, overwrite=overwrite)
    plan = _on_disk(plan, progress)
    check_apart(out, (*plan.into.files, *files_of(plan.patch)))
    measured: dict[str, MergeSums] = {}
    read_digests: dict[str, str] = {}
    written_digests: dict[str, str] = {}
    done = 0
    with staged_folder(out, overwrite=overwrite) as folder:
        for shard in plan.shards:
            with ShardWriter(folder, shard) as writer:
                for entry in shard.entries:
                    read, written = blake3(), blake3()
                    for block in blocks_of(plan.steps[entry.name], rounding):
                        writer.append(block.data)
                        read.update(block.source)
                        written.update(block.data)
                        if block.sums is not None:
                            measured[entry.name] = measured.get(entry.name, MergeSums()) + block.sums
                        done += len(block.data)
                        progress("merge", done, plan.n_bytes, "bytes")
                    read_digests[plan.steps[entry.name].source.name] = read.hexdigest()
                    written_digests[entry.name] = written.hexdigest()
        write_index(folder, plan.shards)
        if plan.into.folder is not None:
            copy_side_files(plan.into.folder, folder, config_changes=plan.config_changes)
        report = _report(plan, out, folder, rounding, measured, read_digests, written_digests)
        write_manifest(folder, report, program=__version__)
    _remember_digests(plan.into, read_digests)
    _remember_digests(open_checkpoint(out), written_digests)
    return report


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
    measured: Mapping[str, MergeSums],
    read_digests: Mapping[str, str],
    written_digests: Mapping[str, str],
) -> MergeReport:
    written = open_checkpoint(folder)
    return MergeReport(
        output=ModelIdentity(out.name, fingerprint(written), digest_of(written_digests, own_tensors(written))),
        into=replace(plan.identity, digest=digest_of(read_digests, own_tensors(plan.into))),
        patch=plan.patch.record,
        dtype=tuple(sorted({plan.steps[name].entry.dtype for name in measured})),
        rounding=str(rounding),
        tensors=measured,
        n_copied=len(plan.steps) - plan.n_changed,
        n_bytes=plan.n_bytes,
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
