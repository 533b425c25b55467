"""Merge a patch into a model's own files, where there is no space for a copy, and undo it bit for bit.

First the old bytes of the tensors that change are kept beside the weights, then these are overwritten. After a death at
any moment the same command finishes, or `undo` restores: everything is made again from the old bytes, so that it does
not matter how far the dead run came. See `portllm.merging.undo` for what lies in the folder meanwhile.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from blake3 import blake3
from msgspec import structs

from portllm import __version__
from portllm.checkpoint.folder import open_folder
from portllm.checkpoint.model.equality import listed_tensors, require_equal
from portllm.checkpoint.model.identity import digest_of, digest_tensor, fingerprint
from portllm.checkpoint.model.side_files import require_writable_name
from portllm.checkpoint.model.unfinished import UNFINISHED_FILE
from portllm.checkpoint.safetensors.writer import ShardWriter, lay_out
from portllm.errors import CheckpointError, OutputBusyError, OutputError, Refusal, refuse
from portllm.files.input_file import require_in_place, require_unchanged
from portllm.files.json_file import read_json
from portllm.files.output_folder import staged_folder
from portllm.files.own_files import Held, is_own_file, open_own, remove_file, write_within
from portllm.files.page_cache import is_large
from portllm.files.record import decode_sealed
from portllm.files.seal import digest_header
from portllm.files.source import LocalFile
from portllm.matching.compatibility import taken_tie
from portllm.matching.side_files import BASE
from portllm.merging.manifest import (
    MANIFEST_FILE,
    Manifest,
    MergeReport,
    digest_side_files,
    is_manifest,
    render_manifest,
)
from portllm.merging.merge import digest_inputs, require_bfloat16
from portllm.merging.options import MergeOptions
from portllm.merging.plan import MergePlan, MergeStep, plan_merge
from portllm.merging.rounding_modes import NEAREST, Rounding, Stochastic
from portllm.merging.tensor import Target, TensorOptions, TensorResults, make_tensor, require_device, workspaces
from portllm.merging.undo import UNDO_FOLDER, Undo, alone, forget, mark, original, read_undo, unmark, write_undo
from portllm.patch.adapter_folder import PatchLike, files_of, load_patch
from portllm.patch.patch import Patch
from portllm.patch.record import ModelIdentity
from portllm.progress import Progress, silent
from portllm.tensors.bytes import read_bytes
from portllm.tensors.info import TensorInfo
from portllm.workers.threads import Tell, run_side_by_side

COPY_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class InPlacePlan:
    """A patch about to be merged into a model's own files.

    Attributes:
        merge: What becomes of each tensor; sources are the old bytes.
        folder: The model's.
        undo: What an interrupted run has kept already, or None.
    """

    merge: MergePlan
    folder: Path
    undo: Undo | None

    @property
    def kept(self) -> Mapping[str, MergeStep]:
        """The tensors whose old bytes are kept."""
        return {name: step for name, step in self.merge.steps.items() if step.change is not None}

    @property
    def kept_bytes(self) -> int:
        """How many bytes these have: the room that the merge needs."""
        return sum(step.source.n_bytes for step in self.kept.values())


def plan_in_place(
    patch: Patch[TensorInfo],
    folder: Path,
    *,
    rounding: Rounding = NEAREST,
    device: str = "cpu",
    allow_other_base: bool = False,
) -> InPlacePlan:
    """Plan to merge a patch into a model's own files; arguments and errors as for `merge_in_place`."""
    if not folder.is_dir():
        raise OutputError(
            f"'{folder}': only a local folder can be merged in place, not a single file, a Hub model or a "
            "built-in one. Write to another folder with --output."
        )
    undo = _read_undo(folder)
    is_unfinished = os.path.lexists(folder / UNFINISHED_FILE)
    options = MergeOptions(rounding=rounding, device=device, allow_other_base=allow_other_base, tokenizer=BASE)
    plan = plan_merge(patch, into=original(folder, undo, name=str(folder)), options=options)
    refusals = [*plan.refusals, *_fixed_files(folder)]
    if undo is not None and not is_unfinished:
        refusals.append(
            Refusal(
                str(folder),
                "has an in-place merge that can still be undone. Undo it (portllm merge --undo FOLDER), or "
                f"delete '{UNDO_FOLDER}' to keep it for good.",
            )
        )
    if plan.beside.files:
        refusals.append(
            Refusal(
                str(folder),
                f"{', '.join(plan.beside.files)} of the patch would have to be written beside the weights, which is "
                "not done in place. Write to another folder with --output.",
            )
        )
    if plan.config_changes:
        refusals.append(
            Refusal(
                str(folder), "the output has a separate head or more rows, for which the model's files have no space."
            )
        )
    found = InPlacePlan(plan, folder, undo)
    free = shutil.disk_usage(folder).free
    if undo is None and found.kept_bytes > free:
        refusals.append(
            Refusal(
                str(folder),
                f"{found.kept_bytes:,} bytes must be saved for --undo, but the disk has {free:,} free.",
            )
        )
    return replace(found, merge=replace(plan, refusals=tuple(sorted(refusals))))


def run_in_place(plan: InPlacePlan, *, progress: Progress = silent) -> MergeReport:
    """Carry out a plan; see `merge_in_place`."""
    refuse(plan.merge.refusals)
    options = plan.merge.options
    if isinstance(options.rounding, Stochastic):
        require_bfloat16(plan.merge)
    how = TensorOptions(options.rounding, require_device(options.device), keep_cached=not is_large(plan.merge.n_bytes))
    with alone(plan.folder) as held:
        if _read_undo(plan.folder) != plan.undo:
            raise OutputBusyError(f"'{plan.folder}': was changed by another run in the meantime. Run again.")
        require_unchanged(plan.merge.files)
        taken = (*plan.merge.taken, *taken_tie(plan.merge.patch, plan.merge.into))
        require_equal(taken, progress=progress)
        undo = plan.undo or _keep(held, plan, _digest(plan, how), progress)
        if undo.plan != _digest(plan, how):
            raise OutputError(
                f"'{plan.folder}': a merge with another patch or other options was interrupted here. Finish it "
                f"with its own command, or undo it: portllm merge --undo {plan.folder}"
            )
        try:
            facts = _overwrite(held, plan, undo, how, progress)
            require_in_place(plan.merge.into.files)
            require_unchanged(files_of(plan.merge.patch))
            report = _report(plan, undo, how, facts)
            write_within(held, MANIFEST_FILE, render_manifest(report, program=__version__))
        except BaseException:
            require_in_place(plan.merge.into.files)  # or old bytes would go into somebody else's file
            _restore(held, plan.folder, undo, progress)
            raise
        unmark(held)
    return report


def merge_in_place(
    patch: PatchLike,
    folder: str | Path,
    *,
    rounding: Rounding = NEAREST,
    device: str = "cpu",
    allow_other_base: bool = False,
    progress: Progress = silent,
) -> MergeReport:
    """Merge a patch into a model's own files; `undo_merge` restores them.

    The overwritten bytes are kept in the folder. A run that fails restores them; a killed one leaves a marker file,
    with which every command refuses the folder until the same call finishes or `undo_merge` restores it.

    Args:
        patch: The patch to add.
        folder: The model that it belongs to.
        rounding: How sums are rounded to the storage dtype.
        device: Device for the sums, `cpu` or `cuda`.
        allow_other_base: Accept a model other than the one the patch was made on.
        progress: Progress callback (bytes).

    Raises:
        PlanRefusedError: The patch does not match, the files cannot be overwritten, or the disk is full.
        OutputBusyError: Another run writes there.
        OutputError: There is no folder, or another merge was interrupted there.
        NonFiniteError, UnsupportedDtypeError, DeviceError: As `merge`.
    """
    plan = plan_in_place(
        load_patch(patch), Path(folder), rounding=rounding, device=device, allow_other_base=allow_other_base
    )
    return run_in_place(plan, progress=progress)


def undo_merge(folder: str | Path, *, progress: Progress = silent) -> int:
    """Undo an in-place merge: restore the overwritten weights and manifest, and return the number of tensors restored.

    The saved bytes are checked before the first is written, and the written ones after the last.

    Raises:
        CheckpointError: The saved bytes are corrupt or of another model, or the model was changed after the merge.
        OutputError: There is nothing to undo, or a file cannot be overwritten.
        OutputBusyError: Another run writes there.
    """
    folder = Path(folder)
    with alone(folder) as held:
        undo = _read_undo(folder)
        is_unfinished = os.path.lexists(folder / UNFINISHED_FILE)
        if undo is None:
            if not is_unfinished:
                raise OutputError(f"'{folder}': there is no in-place merge to undo.")
            unmark(held)
            return 0
        original(folder, undo, name=str(folder))  # raises where the old bytes are of another model
        if not is_unfinished:
            _require_unchanged(folder)
        for name, info in undo.tensors.items():
            if digest_tensor(info) != undo.digests[name]:
                raise CheckpointError(
                    f"'{info.file}': the saved bytes of '{name}' are corrupt, so nothing was changed. Download "
                    "the model again."
                )
        _restore(held, folder, undo, progress)
    return len(undo.tensors)


def _fixed_files(folder: Path) -> list[Refusal]:
    """Why a model's files cannot be overwritten."""
    refusals = []
    for file in open_folder(folder, name=str(folder)).files:
        path = Path(str(file))
        if path.is_symlink() or path.stat().st_nlink > 1:
            refusals.append(
                Refusal(str(path), "is a link, so its contents are shared with other files. Copy the model first.")
            )
        elif not os.access(path, os.W_OK):
            refusals.append(Refusal(str(path), "may not be written."))
    manifest = folder / MANIFEST_FILE
    if os.path.lexists(manifest) and not (is_own_file(manifest) and is_manifest(_said(manifest))):
        refusals.append(Refusal(str(manifest), "is not a merge manifest and could not be restored. Move it away."))
    for entry in folder.iterdir():
        require_writable_name(entry)
    return refusals


def _read_undo(folder: Path) -> Undo | None:
    """What can be taken back; CheckpointError where it would put back another text than a manifest."""
    undo = read_undo(folder)
    if undo is not None and undo.manifest is not None and not is_manifest(undo.manifest):
        raise CheckpointError(
            f"'{folder / UNDO_FOLDER}': contains a file that no in-place merge writes, so nothing was changed. "
            "Download the model again."
        )
    return undo


def _said(manifest: Path) -> str:
    return manifest.read_text(encoding="utf-8", errors="replace")


def _digest(plan: InPlacePlan, how: TensorOptions) -> str:
    """A digest of all that the new bytes depend on."""
    inputs = {**digest_inputs(plan.merge, how), "into": plan.merge.identity.fingerprint}
    return blake3(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _keep(held: Held, plan: InPlacePlan, digest: str, progress: Progress) -> Undo:
    """Bring the old bytes of what will be overwritten to another place on the disk, and mark the model."""
    digests: dict[str, str] = {}
    done = 0
    kept_from = {step.source.file for step in plan.kept.values()}
    (shard,) = lay_out({name: step.entry for name, step in plan.kept.items()}, shard_bytes=plan.kept_bytes + 1)
    with (
        _unmarked_if_it_fails(held),
        staged_folder(plan.folder / UNDO_FOLDER, overwrite=False, inputs=kept_from) as folder,
    ):
        with ShardWriter(folder, shard) as writer:
            for entry in shard.entries:
                state, info = blake3(), plan.kept[entry.name].source
                for start in range(0, info.n_bytes, COPY_BYTES):
                    data = read_bytes(info, start, min(start + COPY_BYTES, info.n_bytes))
                    state.update(data)
                    writer.append(data)
                    done += len(data)
                    progress("keep the old bytes", done, plan.kept_bytes, "bytes")
                digests[entry.name] = state.hexdigest()
        manifest = plan.folder / MANIFEST_FILE
        write_undo(folder, plan=digest, digests=digests, manifest=_said(manifest) if manifest.is_file() else None)
        mark(held, "merge")
    undo = _read_undo(plan.folder)
    assert undo is not None
    return undo


@contextmanager
def _unmarked_if_it_fails(held: Held) -> Iterator[None]:
    try:
        yield
    except BaseException:
        unmark(held)
        raise


def _overwrite(held: Held, plan: InPlacePlan, undo: Undo, how: TensorOptions, progress: Progress) -> TensorResults:
    """Write the new bytes, made from the old ones that are kept; what is not changed is read for its digest."""
    total, done = TensorResults(), 0
    places = listed_tensors(open_folder(plan.folder, name=str(plan.folder)).infos)

    def told(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress("merge", done, plan.merge.n_bytes, "bytes")

    def job(step: MergeStep, tell: Tell) -> TensorResults:
        place = places[step.entry.name]
        write = _nowhere if step.change is None else partial(_write, files[str(place.file)], place.start)
        bench = free.get()
        try:
            (made,) = make_tensor([Target(step, write)], bench, tell)
        finally:
            free.put(bench)
        if not isinstance(made, TensorResults):
            raise made
        return made

    with ExitStack() as opened, workspaces(how, plan.merge.steps.values()) as free:
        files = _open(held, {str(info.file) for info in places.values()}, opened)
        steps = (
            replace(step, source=_written_beside(step.source) if step.change is None else undo.tensors[name])
            for name, step in plan.merge.steps.items()
        )
        run_side_by_side((partial(job, step) for step in steps), threads=how.threads, told=told, done=total.add)
        for file in files.values():
            os.fsync(file)
    return total


def _restore(held: Held, folder: Path, undo: Undo, progress: Progress) -> None:
    """Bring the old bytes back, the manifest too, and see that they are there."""
    places = listed_tensors(open_folder(folder, name=str(folder)).infos)
    done, total = 0, sum(info.n_bytes for info in undo.tensors.values())
    with ExitStack() as opened:
        files = _open(held, {str(places[name].file) for name in undo.tensors}, opened)
        mark(held, "undo")
        for name, info in undo.tensors.items():
            write = partial(_write, files[str(places[name].file)], places[name].start)
            for start in range(0, info.n_bytes, COPY_BYTES):
                data = read_bytes(info, start, min(start + COPY_BYTES, info.n_bytes))
                write(start, memoryview(data))
                done += len(data)
                progress("undo", done, total, "bytes")
        for file in files.values():
            os.fsync(file)
    restored = listed_tensors(open_folder(folder, name=str(folder)).infos)
    for name in undo.tensors:
        if digest_tensor(restored[name]) != undo.digests[name]:
            raise OutputError(
                f"'{folder}': '{name}' does not contain the bytes that were written to it. The disk may be failing."
            )
    if undo.manifest is None:
        remove_file(held, MANIFEST_FILE)
    else:
        write_within(held, MANIFEST_FILE, undo.manifest)
    forget(held)
    unmark(held)


def _written_beside(info: TensorInfo) -> TensorInfo:
    """A tensor that is read while this program writes to other places of its file."""
    parts = tuple((suffix, _written_beside(part)) for suffix, part in info.parts)
    return replace(info, file=LocalFile(Path(str(info.file))), parts=parts)


def _require_unchanged(folder: Path) -> None:
    """Raise CheckpointError if the weights are not those that the merge in place has left."""
    said = None
    with suppress(CheckpointError, ValueError):
        said = decode_sealed(Manifest, read_json(folder / MANIFEST_FILE)).output.fingerprint
    if said != fingerprint(open_folder(folder, name=str(folder))):
        raise CheckpointError(
            f"'{folder}': its weights changed since the in-place merge, or its '{MANIFEST_FILE}' is missing: "
            f"undoing it would mix two models. Delete '{UNDO_FOLDER}' to keep the weights as they are."
        )


def _report(plan: InPlacePlan, undo: Undo, how: TensorOptions, facts: TensorResults) -> MergeReport:
    written = open_folder(plan.folder, name=str(plan.folder))
    before = original(plan.folder, undo, name=plan.merge.into.name)
    return MergeReport(
        output=ModelIdentity(
            plan.folder.resolve().name,
            fingerprint(written),
            digest_of(facts.written, written),
        ),
        into=structs.replace(plan.merge.identity, digest=digest_of(facts.read, before)),
        patch=plan.merge.patch.record,
        dtype=tuple(sorted({plan.merge.steps[name].entry.dtype for name in facts.sums})),
        rounding=str(how.rounding),
        device=how.device,
        tensors=dict(sorted(facts.sums.items())),
        n_copied=len(plan.merge.steps) - plan.merge.n_changed,
        n_bytes=plan.kept_bytes,
        files={name: value for name, value in digest_side_files(plan.folder).items() if name != UNFINISHED_FILE},
        headers={Path(str(file)).name: digest_header(Path(str(file))) for file in written.files},
    )


def _open(held: Held, files: Iterable[str], opened: ExitStack) -> dict[str, int]:
    """Descriptors of a model's own files, to be overwritten."""
    found = {}
    for file in sorted(files):
        found[file] = open_own(held, Path(file).name, os.O_WRONLY)
        opened.callback(os.close, found[file])
    return found


def _write(file: int, place: int, start: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], place + start + done)


def _nowhere(start: int, data: memoryview) -> None:
    del start, data
