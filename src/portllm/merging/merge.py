"""Add patches to a model's weights, streamed, each for itself: plan, then the tensors, in blocks of rows.

Each thread takes a tensor through reading, arithmetic, digests and writing, so that disk and processors work at the
same time. The model is read once, however many patches there are. Memory holds one block a thread, whatever the size of
the model. What a patch does not touch is copied as bytes. A run that was interrupted or died is gone on with by the
next run of the same plans, from the files it had reached.
"""

import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from blake3 import blake3
from msgspec import structs

from portllm import __version__
from portllm.checkpoint.model.equality import require_equal
from portllm.checkpoint.model.identity import digest_of, fingerprint, remember_digests
from portllm.checkpoint.model.side_files import copy_side_files, side_files
from portllm.checkpoint.open import ModelLike, on_disk, open_checkpoint
from portllm.checkpoint.safetensors.writer import DEFAULT_SHARD_BYTES, write_index
from portllm.errors import OutputError, PortLLMError, RemoteError, UnsupportedDtypeError, refuse
from portllm.files.output_folder import Room, check_apart, check_free
from portllm.files.own_files import holds
from portllm.files.page_cache import is_large
from portllm.matching.compatibility import taken_copies, taken_tie
from portllm.merging.manifest import MANIFEST_FILE, MergeReport, digest_side_files, render_manifest
from portllm.merging.outputs import Output, good, write_outputs
from portllm.merging.plan import MergePlan, plan_merge
from portllm.merging.quantization_gap import measure_gap
from portllm.merging.rounding_modes import NEAREST, Rounding, Stochastic
from portllm.merging.tensor import Facts, How, require_device
from portllm.patch.adapter_folder import PatchLike, digest_tensors, files_of, load_patch
from portllm.patch.record import ModelIdentity
from portllm.progress import Progress, silent

Where = TypeVar("Where", str, Path)

MOST_AT_ONCE = 32
"""Outputs that are written side by side: the model is read once for so many. Each has files open, and threads hold what
all their patches have for a tensor."""


def merge(
    patch: PatchLike,
    *,
    into: ModelLike,
    out: str | Path,
    dtype: str | None = None,
    rounding: Rounding = NEAREST,
    device: str = "cpu",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    quantized_base: ModelLike | None = None,
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
        load_patch(patch),
        into=open_checkpoint(into, progress=progress),
        dtype=dtype,
        shard_bytes=shard_bytes,
        quantized_base=None if quantized_base is None else open_checkpoint(quantized_base, progress=progress),
        allow_other_base=allow_other_base,
    )
    return run_merge(plan, Path(out), rounding=rounding, device=device, overwrite=overwrite, progress=progress)


def merge_each(
    patches: Mapping[Where, PatchLike],
    *,
    into: ModelLike,
    dtype: str | None = None,
    rounding: Rounding = NEAREST,
    device: str = "cpu",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    allow_other_base: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[Where, MergeReport | PortLLMError]:
    """Write the model `into` once for each of some patches, reading it once for all of them.

    Each output has the bytes that `merge` writes, and one that fails stops no other.

    Args:
        patches: What to add, by the folder of the new model.
        into: The model that the patches belong to.
        dtype: As for `merge`.
        rounding: As for `merge`.
        device: As for `merge`.
        shard_bytes: As for `merge`.
        allow_other_base: As for `merge`.
        overwrite: As for `merge`.
        progress: Told of the bytes written, of all outputs together.

    Returns:
        For each folder what was done, or the error that `merge` would have raised.

    Raises:
        UnsupportedDtypeError: `dtype` is not one that weights are stored in.
        DeviceError: There is no such device here.
    """
    model = open_checkpoint(into, progress=progress)
    plans = {
        Path(out): plan_merge(
            load_patch(patch), into=model, dtype=dtype, shard_bytes=shard_bytes, allow_other_base=allow_other_base
        )
        for out, patch in patches.items()
    }
    done = run_merges(plans, rounding=rounding, device=device, overwrite=overwrite, progress=progress)
    return {out: done[Path(out)] for out in patches}


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
    results = run_merges({out: plan}, rounding=rounding, device=device, overwrite=overwrite, progress=progress)
    result = results[out]
    if isinstance(result, PortLLMError):
        raise result
    return result


def run_merges(
    plans: Mapping[Path, MergePlan],
    *,
    rounding: Rounding = NEAREST,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[Path, MergeReport | PortLLMError]:
    """Carry out plans that are all for one model, which is opened once; see `merge_each`."""
    n_bytes = sum(plan.n_bytes for plan in plans.values())
    how = How(rounding, require_device(device), keep_cached=not is_large(n_bytes))
    outputs = [Output(out, plan) for out, plan in plans.items()]
    room = Room()
    for output in outputs:
        with output.alone():
            _require(output.plan, output.out, room, how, overwrite=overwrite)
    _bring_to_disk(good(outputs), progress)
    for output in good(outputs):
        with output.alone():
            _require_apart(output, outputs)
            require_equal(taken_copies(output.plan.patch, output.plan.into), progress=progress)
    reports: dict[Path, MergeReport] = {}
    left = good(outputs)
    for start in range(0, len(left), MOST_AT_ONCE):
        reports |= _run(left[start : start + MOST_AT_ONCE], how, overwrite=overwrite, progress=progress)
    return {output.out: output.error or reports[output.out] for output in outputs}


def _run(outputs: Sequence[Output], how: How, *, overwrite: bool, progress: Progress) -> dict[Path, MergeReport]:
    """Write outputs side by side; the reports of those that have not failed."""
    reports: dict[Path, MergeReport] = {}
    with ExitStack() as opened:
        for output in outputs:
            opened.push(output.opened)
            with output.alone():
                output.begin(overwrite=overwrite, digest=_digest_plan(output.plan, how))
        begun = good(outputs)
        total = sum(output.plan.n_bytes for output in begun)
        n_left = sum(entry.n_bytes for output in begun for shard in output.left for entry in shard.entries)
        write_outputs(begun, how, _count(total, n_left, progress))
        for output in outputs:
            with output.alone(), output.ending() as folder:
                reports[output.out] = _finish(output, folder, how, progress)
    for output in good(outputs):
        # A stored copy of a tied embedding is not read when the patch gives the output a head of its own.
        remember_digests(output.plan.into, output.known.read)
        remember_digests(open_checkpoint(output.out), output.known.written)
    return reports


def _finish(output: Output, folder: Path, how: How, progress: Progress) -> MergeReport:
    """Write what goes beside the weights."""
    plan = output.plan
    require_equal(taken_tie(plan.patch, plan.into), known=output.known.read, progress=progress)
    write_index(folder, plan.shards)
    if plan.into.folder is not None:
        copy_side_files(plan.into.folder, folder, config_changes=plan.config_changes)
    report = _report(plan, output.out, folder, how, output.known)
    if plan.fitted is not None:
        gap = measure_gap(plan, plan.fitted, output.known.sums, progress=progress)
        report = replace(report, quantization=gap)
    (folder / MANIFEST_FILE).write_text(render_manifest(report, program=__version__), encoding="utf-8")
    return report


def _require(plan: MergePlan, out: Path, room: Room, how: How, *, overwrite: bool) -> None:
    """Raise if a plan cannot be carried out, else set room aside for its output."""
    refuse((*plan.refusals, *room.refusals(out, plan.n_bytes)))
    if isinstance(how.rounding, Stochastic):
        require_bfloat16(plan)
    check_free(out, overwrite=overwrite)
    room.promise(out, plan.n_bytes)


def _require_apart(output: Output, outputs: Sequence[Output]) -> None:
    """Raise if an output would replace what is read for any of them, or copy what must not be."""
    patches = [file for other in outputs for file in files_of(other.plan.patch)]
    check_apart(output.out, (*output.plan.into.files, *patches))
    inner = next((other.out for other in outputs if other is not output and holds(output.out, other.out)), None)
    if inner is not None:
        raise OutputError(f"'{output.out}': is or would hold '{inner}', another output. Write to another folder.")
    if output.plan.into.folder is not None:
        side_files(output.plan.into.folder)  # refuses what must not be copied, before there is any work to lose


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


def _bring_to_disk(outputs: Sequence[Output], progress: Progress) -> None:
    """Download the model that all plans are for, where it is not on disk."""
    if not outputs:
        return
    model = outputs[0].plan.into
    if any(output.plan.into is not model for output in outputs):
        raise ValueError("the plans are for several models")
    try:
        into = on_disk(model, progress=progress)
        if into is not model and fingerprint(into) != outputs[0].plan.identity.fingerprint:
            raise RemoteError(
                f"'{into.folder}': is not what {into.name} is on the hub: its fingerprint differs from "
                f"{outputs[0].plan.identity.fingerprint}. Delete it and run again."
            )
    except PortLLMError as error:
        for output in outputs:
            output.fail(error)
        return
    if into is not model:
        for output in outputs:
            steps = output.plan.steps.items()
            moved = {name: replace(step, source=into.infos[step.source.name]) for name, step in steps}
            output.plan = replace(output.plan, into=into, steps=moved)


def _report(
    plan: MergePlan,
    out: Path,
    folder: Path,
    how: How,
    facts: Facts,
) -> MergeReport:
    written = open_checkpoint(folder)
    return MergeReport(
        output=ModelIdentity(out.name, fingerprint(written), digest_of(facts.written, written)),
        into=structs.replace(plan.identity, digest=digest_of(facts.read, plan.into)),
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
