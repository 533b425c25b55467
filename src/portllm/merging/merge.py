"""Merge patches into a model's weights, one output per patch, streamed in blocks of rows.

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

from blake3 import blake3
from msgspec import structs

from portllm import __version__
from portllm.checkpoint.model.equality import require_equal
from portllm.checkpoint.model.identity import digest_of, fingerprint, remember_digests
from portllm.checkpoint.model.side_files import copy_side_files, side_files
from portllm.checkpoint.open import ModelLike, on_disk, open_checkpoint
from portllm.checkpoint.safetensors.writer import write_index
from portllm.errors import OutputError, PortLLMError, RemoteError, UnsupportedDtypeError, refuse
from portllm.files.output_folder import Room, check_apart, check_free
from portllm.files.own_files import holds
from portllm.files.page_cache import is_large
from portllm.files.source import LocalFile
from portllm.matching.compatibility import taken_tie
from portllm.merging.card import card_of
from portllm.merging.manifest import MANIFEST_FILE, MergeReport, digest_side_files, render_manifest
from portllm.merging.options import AS_IT_IS, MergeOptions
from portllm.merging.outputs import Output, good, not_written, write_outputs
from portllm.merging.plan import MergePlan, as_listed, plan_merge
from portllm.merging.quantization_gap import measure_gap
from portllm.merging.rounding_modes import Stochastic
from portllm.merging.tensor import TensorOptions, TensorResults, require_device
from portllm.patch.adapter_folder import PatchLike, digest_tensors, files_of, load_patch
from portllm.patch.card import write_model_card
from portllm.patch.folders import Where
from portllm.patch.record import ModelIdentity
from portllm.patch.side_files import copy_into
from portllm.progress import Progress, silent

MOST_AT_ONCE = 32
"""Outputs that are written side by side: the model is read once for so many. Each has files open, and threads hold what
all their patches have for a tensor."""

QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""What some programs write beside a model to say how its weights are quantized, and others go by."""


def merge(
    patch: PatchLike,
    *,
    into: ModelLike,
    out: str | Path,
    options: MergeOptions = AS_IT_IS,
    quantized_base: ModelLike | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> MergeReport:
    """Merge a patch into the weights of `into` and write the model to `out`.

    Each changed weight is `Q(W + s·B·A)`: the sum in float32, rounded once. For plain LoRA with nearest rounding the
    bytes equal those of PEFT's `merge_and_unload`. An existing `out` stays until the new one is complete. An
    interrupted run leaves its finished files beside `out`, and the next one with the same arguments resumes from them.

    Args:
        patch: The patch to add.
        into: The model the patch belongs to; a Hub model is downloaded once the patch is known to match it.
        out: The new model's folder.
        options: Output dtype, rounding, device and shard size.
        quantized_base: The quantized model the patch was trained on, if it was made from `into`.
        overwrite: Replace `out` if it exists.
        progress: Progress callback (bytes written).

    Returns:
        A report with the kept gain and rounding loss of each tensor.

    Raises:
        PlanRefusedError: The patch does not match, or the disk is too small; lists every reason.
        OutputExistsError: `out` exists.
        OutputBusyError: Another run writes to `out`.
        OutputError: `out` cannot be written, or contains an input.
        NonFiniteError: A weight, a delta or a sum is infinite or NaN.
        UnsupportedDtypeError: The dtype is not supported, or not with this rounding.
        DeviceError: The device is not available.
    """
    plan = plan_merge(
        load_patch(patch),
        into=open_checkpoint(into, progress=progress),
        options=options,
        quantized_base=None if quantized_base is None else open_checkpoint(quantized_base, progress=progress),
    )
    return run_merge(plan, Path(out), overwrite=overwrite, progress=progress)


def merge_each(
    patches: Mapping[Where, PatchLike],
    *,
    into: ModelLike,
    options: MergeOptions = AS_IT_IS,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[Where, MergeReport | PortLLMError]:
    """Merge each of several patches into `into`, one output per patch, reading the model once.

    Each output has the bytes that `merge` writes; a failing one does not stop the others.

    Args:
        patches: The patches to add, by output folder.
        into: The model that the patches belong to.
        options: Output dtype, rounding, device and shard size.
        overwrite: Replace outputs that exist.
        progress: Progress callback (bytes written, over all outputs).

    Returns:
        For each folder the report, or the error that `merge` would have raised.

    Raises:
        UnsupportedDtypeError: The dtype is not supported.
        DeviceError: The device is not available.
    """
    model = open_checkpoint(into, progress=progress)
    plans = {Path(out): plan_merge(load_patch(patch), into=model, options=options) for out, patch in patches.items()}
    done = run_merges(plans, overwrite=overwrite, progress=progress)
    return {out: done[Path(out)] for out in patches}


def run_merge(plan: MergePlan, out: Path, *, overwrite: bool = False, progress: Progress = silent) -> MergeReport:
    """Carry out a plan; see `merge`."""
    result = run_merges({out: plan}, overwrite=overwrite, progress=progress)[out]
    if isinstance(result, PortLLMError):
        raise result
    return result


def run_merges(
    plans: Mapping[Path, MergePlan], *, overwrite: bool = False, progress: Progress = silent
) -> dict[Path, MergeReport | PortLLMError]:
    """Carry out plans that are all for one model, which is opened once, and with one set of options; see `merge_each`.

    Raises:
        DeviceError: The device is not available.
    """
    if not plans:
        return {}
    first = next(iter(plans.values()))
    if any(plan.into is not first.into or plan.options != first.options for plan in plans.values()):
        raise ValueError("the plans are for several models, or for several ways to merge")
    n_bytes = sum(plan.n_bytes for plan in plans.values())
    how = TensorOptions(first.options.rounding, require_device(first.options.device), keep_cached=not is_large(n_bytes))
    failed = problems(plans, overwrite=overwrite)
    there = {out: plan for out, plan in plans.items() if out not in failed}
    try:
        outputs = [Output(out, plan) for out, plan in _on_disk(there, progress).items()]
    except PortLLMError as error:
        return {out: failed.get(out, error) for out in plans}
    for output in outputs:
        with output.alone():
            _require_apart(output, outputs)
            require_equal(output.plan.taken, progress=progress)
    reports: dict[Path, MergeReport] = {}
    left = good(outputs)
    for start in range(0, len(left), MOST_AT_ONCE):
        reports |= _run(left[start : start + MOST_AT_ONCE], how, overwrite=overwrite, progress=progress)
    failed |= {output.out: output.error for output in outputs if output.error is not None}
    return {out: failed[out] if out in failed else reports[out] for out in plans}


def problems(plans: Mapping[Path, MergePlan], *, overwrite: bool = False) -> dict[Path, PortLLMError]:
    """Why plans cannot be carried out, by the output's folder; room on the disk is counted for those that can."""
    room = Room()
    found: dict[Path, PortLLMError] = {}
    for out, plan in plans.items():
        try:
            refuse((*plan.refusals, *room.refusals(out, plan.n_bytes)))
            if isinstance(plan.options.rounding, Stochastic):
                require_bfloat16(plan)
            check_free(out, overwrite=overwrite)
            room.promise(out, plan.n_bytes)
        except (PortLLMError, OSError) as error:
            found[out] = not_written(out, error)
    return found


def _run(
    outputs: Sequence[Output], how: TensorOptions, *, overwrite: bool, progress: Progress
) -> dict[Path, MergeReport]:
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


def _finish(output: Output, folder: Path, how: TensorOptions, progress: Progress) -> MergeReport:
    """Write what goes beside the weights."""
    plan = output.plan
    require_equal(taken_tie(plan.patch, plan.into), known=output.known.read, progress=progress)
    write_index(folder, plan.shards)
    if plan.into.folder is not None:
        leave_out = {*plan.beside.leave_out}
        if plan.into.quantization is not None and not plan.keeps_storage:
            leave_out |= {*QUANTIZATION_FILES}
        copy_side_files(plan.into.folder, folder, config_changes=plan.config_changes, leave_out=leave_out)
    copy_into(folder, plan.beside.files)
    for name, text in plan.beside.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    report = _report(plan, output.out, folder, how, output.known)
    if plan.fitted is not None:
        gap = measure_gap(plan, plan.fitted, output.known.sums, progress=progress)
        report = replace(report, quantization=gap)
    write_model_card(folder, card_of(report), plan.patch, into=plan.into, identity=plan.identity)
    (folder / MANIFEST_FILE).write_text(render_manifest(report, program=__version__), encoding="utf-8")
    return report


def _require_apart(output: Output, outputs: Sequence[Output]) -> None:
    """Raise if an output would replace what is read for any of them, or copy what must not be."""
    patches = [file for other in outputs for file in files_of(other.plan.patch)]
    check_apart(output.out, (*output.plan.into.files, *patches))
    inner = next((other.out for other in outputs if other is not output and holds(output.out, other.out)), None)
    if inner is not None:
        raise OutputError(f"'{output.out}': is or would contain '{inner}', another output. Write to another folder.")
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


def _digest_plan(plan: MergePlan, how: TensorOptions) -> str:
    """A digest of all that the bytes of the weights depend on; the model's files count by size and time of change."""
    states = [file.state for file in plan.into.files if isinstance(file, LocalFile)]
    files = [[state.size, state.mtime_ns] for state in states if state is not None]
    inputs = {**digest_inputs(plan, how), "into": [plan.identity.fingerprint, files]}
    return blake3(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def digest_inputs(plan: MergePlan, how: TensorOptions) -> dict[str, object]:
    """All that the bytes of the weights depend on, but for the model's own bytes."""
    return {
        "programs": {name: importlib.metadata.version(name) for name in ("portllm", "torch")},
        "patch": [digest_tensors(plan.patch), plan.patch.config.fields],
        "rounding": str(how.rounding),
        "device": how.device,
        "shards": [[shard.file, [[e.name, e.dtype, e.shape] for e in shard.entries]] for shard in plan.shards],
    }


def _on_disk(plans: Mapping[Path, MergePlan], progress: Progress) -> Mapping[Path, MergePlan]:
    """The plans for the model as it is on this disk; downloaded where it was not there.

    Raises:
        RemoteError: It cannot be had, or is not the one that was planned with.
    """
    if not plans:
        return plans
    planned = next(iter(plans.values()))
    into = on_disk(planned.into, progress=progress)
    if into is planned.into:
        return plans
    if fingerprint(into) != planned.identity.fingerprint:
        raise RemoteError(
            f"'{into.folder}': is not {into.name} as it is on the Hub: its fingerprint differs from "
            f"{planned.identity.fingerprint}. Delete it and run again."
        )
    sources = as_listed(into.infos) if planned.keeps_storage else into.infos
    return {
        out: replace(
            plan,
            into=into,
            steps={
                name: replace(step, source=sources.get(step.source.name, step.source))
                for name, step in plan.steps.items()
            },
        )
        for out, plan in plans.items()
    }


def _report(
    plan: MergePlan,
    out: Path,
    folder: Path,
    how: TensorOptions,
    facts: TensorResults,
) -> MergeReport:
    written = open_checkpoint(folder)
    return MergeReport(
        output=ModelIdentity(out.name, fingerprint(written), digest_of(facts.written, written)),
        into=plan.identity
        if plan.leave_out
        else structs.replace(plan.identity, digest=digest_of(facts.read, plan.into)),
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
            f"'{other.name}': would be stored as {other.dtype}, but stochastic rounding only supports BF16. Use "
            "--dtype BF16, or round to nearest."
        )
