"""Capture a patch: write down, beside an adapter, which base it belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from portllm import __version__
from portllm.capturing.initial_plan import needs_conversion, unconvertible
from portllm.capturing.stored_values import StoredValues, settled, stacked
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import TakenForEqual, require_equal
from portllm.checkpoint.open import on_disk
from portllm.errors import Refusal, refuse
from portllm.files.output_folder import staged_folder
from portllm.files.source import LocalFile
from portllm.matching.added_tokens import added_tokens, height_of, own_rows, unexplained, unplaced, with_own_rows
from portllm.matching.base_copies import HeldCopies, hold_copies
from portllm.matching.compatibility import mismatches
from portllm.matching.own_values import own_values, without
from portllm.matching.spelling import as_running
from portllm.methods.values import Values
from portllm.patch.adapter_folder import digest_tensors, files_of, load_patch, write_patch, write_record
from portllm.patch.adapter_start import named_init
from portllm.patch.card import write_patch_card
from portllm.patch.finite import require_finite
from portllm.patch.identify import identify, identity_of_base
from portllm.patch.nothing import why_nothing
from portllm.patch.patch import Patch
from portllm.patch.record import Capture, FittedTo, PatchRecord
from portllm.patch.side_files import uncopyable
from portllm.progress import Progress, silent
from portllm.tensors.info import TensorInfo


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """An adapter about to be written down as a patch of a base.

    Attributes:
        adapter: As it was opened.
        base: The model that it was made on.
        initial: The adapter before training, where it was given.
        fitted_to: How the base was quantized when the adapter was trained.
        patch: The adapter, without its copies of the base's weights.
        taken: What is compared whole before it is written.
        notes: What a user should know.
        refusals: Every reason not to run.
        added: Tokens that were added to the base's vocabulary for the adapter, with their rows.
    """

    adapter: Patch[TensorInfo]
    base: Checkpoint
    initial: Patch[TensorInfo] | None
    fitted_to: FittedTo | None
    patch: Patch[TensorInfo]
    taken: tuple[TakenForEqual, ...]
    notes: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    added: Mapping[str, int]

    @property
    def nothing(self) -> str | None:
        """Why the adapter changes nothing; None where it does. Reads factors."""
        return why_nothing(self.patch)


def plan_capture(
    adapter: Patch[TensorInfo],
    *,
    base: Checkpoint,
    initial: Patch[TensorInfo] | None = None,
    fitted_to: FittedTo | None = None,
) -> CapturePlan:
    """Plan to capture an adapter as a patch of this base, fitted to it as said."""
    # The copies that come with an adapter which is to be converted are of what was left of the base's weights.
    is_converted = needs_conversion(adapter, initial)
    held = HeldCopies(replace(adapter, base_copies={})) if is_converted else hold_copies(adapter, base)
    own = own_values(held.patch, base)
    added = added_tokens(held.patch, base)
    height = height_of(held.patch, base)
    refusals = [
        *held.refusals,
        *uncopyable(adapter.beside),
        *unexplained(held.patch, base, added),
        *unplaced(held.patch),
        *mismatches(without(held.patch, own), base, n_rows=height),
        *unconvertible(adapter, base, initial),
    ]
    if adapter.record is not None:
        refusals.append(
            Refusal(
                "--adapter",
                f"'{adapter.name}' is already a patch: its patch.json names {adapter.record.base.name} as its "
                "base. Use it as it is, or port it to another base with 'portllm port'.",
            )
        )
    if fitted_to is not None and base.quantization is not None:
        refusals.append(
            Refusal(
                "--fitted-to",
                f"{base.name} is already quantized ({base.quantization}), and the patch records it. Omit the "
                "option, or pass the 16-bit model that was quantized when the adapter was trained.",
            )
        )
    return CapturePlan(
        adapter, base, initial, fitted_to, held.patch, held.taken, held.notes, tuple(sorted(refusals)),
        added,
    )  # fmt: skip


def capture_adapter(
    adapter: Patch[TensorInfo],
    *,
    base: Checkpoint,
    out: Path,
    initial: Patch[TensorInfo] | None = None,
    method: str = "adapter",
    settings: Mapping[str, object] | None = None,
    fitted_to: FittedTo | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Patch[TensorInfo]:
    """Write an adapter to `out` as a patch that knows its base.

    An adapter that began with a part of the base's weights (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) is converted: what it
    began with is taken from its factors, and the patch belongs to the base as it was. See `docs/adapters.md`.

    Args:
        adapter: A PEFT folder without a record, opened with `load_patch`, or with `open_adapter` to be converted.
        base: The model it was made on; every module and shape is checked against it.
        out: The patch's folder.
        initial: The adapter as it was saved before training. PiSSA's exact kind and OLoRA can do without: what they
            began with is computed anew from the base's weights.
        method: How the adapter came to be, for the record.
        settings: What shaped it, for the record.
        fitted_to: How the base was quantized when the adapter was trained on it (QLoRA); None where it was not.
        overwrite: Replace `out` if it exists.
        progress: Told of a conversion, and of weights that the adapter has copies of.

    Raises:
        PlanRefusedError: The adapter does not fit the base, or cannot be converted, with every reason.
        OutputExistsError: `out` exists.
        OutputError: `out` cannot be written, or contains an input.
        NonFiniteError: A tensor of the adapter holds an infinity or NaN.
    """
    plan = plan_capture(adapter, base=base, initial=initial, fitted_to=fitted_to)
    return run_capture(plan, out, method=method, settings=settings, overwrite=overwrite, progress=progress)


def run_capture(
    plan: CapturePlan,
    out: Path,
    *,
    method: str = "adapter",
    settings: Mapping[str, object] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Patch[TensorInfo]:
    """Carry out a plan; see `capture_adapter`."""
    refuse(plan.refusals)
    adapter, initial, base = plan.adapter, plan.initial, plan.base
    files = (*base.files, *files_of(adapter), *(() if initial is None else files_of(initial)))
    require_finite(plan.patch)
    if not needs_conversion(adapter, initial):
        require_equal(plan.taken, progress=progress)
        with staged_folder(out, overwrite=overwrite, inputs=files) as folder:
            kept: Patch[Values] = plan.patch.mapped(StoredValues)
            with settled(with_own_rows(kept, own_rows(plan.patch, base), stacked, base), folder) as patch:
                captured = Capture(method, dict(settings or {}), plan.fitted_to)
                _write(folder, patch, base, captured, plan.added, adapter.card)
        return load_patch(out)
    from portllm.capturing.initial import convert  # loads torch, which few adapters need
    from portllm.tensors.spool import SPOOL_FILE, Spool

    if initial is None:
        base = on_disk(base, progress=progress)
    with staged_folder(out, overwrite=overwrite, inputs=files) as folder, Spool(folder / SPOOL_FILE) as spool:
        converted = convert(adapter, base=base, initial=initial, spool=spool, progress=progress)
        how = _conversion(adapter, initial, converted.known_to)
        converted_by = Capture(method, {**(settings or {}), **how}, plan.fitted_to)
        _write(folder, converted.patch, base, converted_by, {}, adapter.card)
    return load_patch(out)


def _write(
    folder: Path,
    patch: Patch[TensorInfo],
    base: Checkpoint,
    capture: Capture,
    added: Mapping[str, int],
    card: LocalFile | None,
) -> None:
    patch = as_running(patch, base)
    tensors = digest_tensors(patch)
    write_patch(folder, patch, base_name=base.name, base_revision=base.revision)
    record = PatchRecord(
        program=__version__,
        base=identity_of_base(base, identify(base)),
        capture=capture,
        ports=(),
        tensors=tensors,
        files={},
        added_tokens=added,
        labels=patch.labels,
    )
    write_patch_card(folder, patch, write_record(folder, record), own=card, base=base)


def _conversion(
    adapter: Patch[TensorInfo], initial: Patch[TensorInfo] | None, known_to: Mapping[str, float]
) -> dict[str, object]:
    """How an adapter was converted, for the record."""
    began: dict[str, object] = {"began_with": adapter.config.changed_base or named_init(adapter.config.fields)}
    if initial is not None:
        return {**began, "initial": {"name": initial.name, "tensors": digest_tensors(initial)}}
    worst = max(known_to.values())
    return {**began, "initial": "computed from the base", "known_to": float(f"{worst:.2g}") if worst < 1 else 1.0}
