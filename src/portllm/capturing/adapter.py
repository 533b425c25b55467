"""Capture a patch: write down, beside an adapter, which base it belongs to."""

from collections.abc import Mapping
from pathlib import Path

from portllm import __version__
from portllm.capturing.initial_plan import needs_conversion, unconvertible
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import require_equal
from portllm.checkpoint.open import on_disk
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import PlanRefusedError, Refusal
from portllm.files.output_folder import staged_folder
from portllm.matching.compatibility import altered_copies, mismatches, taken_copies
from portllm.patch.adapter_folder import digest_tensors, files_of, load_patch, write_patch, write_record
from portllm.patch.adapter_start import named_init
from portllm.patch.finite import require_finite
from portllm.patch.identify import identify, identity_of_base
from portllm.patch.patch import Patch
from portllm.patch.record import Capture, FittedTo, PatchRecord
from portllm.progress import Progress, silent


def plan_capture(
    adapter: Patch[TensorInfo],
    *,
    base: Checkpoint,
    initial: Patch[TensorInfo] | None = None,
    fitted_to: FittedTo | None = None,
) -> tuple[Refusal, ...]:
    """Every reason why an adapter cannot be captured as a patch of this base, fitted to it as said."""
    refusals = [*mismatches(adapter, base), *unconvertible(adapter, base, initial)]
    # The copies that come with an adapter which is to be converted are of what was left of the base's weights.
    refusals += () if needs_conversion(adapter, initial) else altered_copies(adapter, base)
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
    return tuple(sorted(refusals))


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
    refusals = plan_capture(adapter, base=base, initial=initial, fitted_to=fitted_to)
    if refusals:
        raise PlanRefusedError(refusals)
    files = (*base.files, *files_of(adapter), *(() if initial is None else files_of(initial)))
    require_finite(adapter)
    if not needs_conversion(adapter, initial):
        require_equal(taken_copies(adapter, base), progress=progress)
        with staged_folder(out, overwrite=overwrite, inputs=files) as folder:
            _write(folder, adapter, base, Capture(method, dict(settings or {}), fitted_to))
        return load_patch(out)
    from portllm.capturing.initial import convert  # loads torch, which few adapters need
    from portllm.checkpoint.reading.spool import SPOOL_FILE, Spool

    if initial is None:
        base = on_disk(base, progress=progress)
    with staged_folder(out, overwrite=overwrite, inputs=files) as folder, Spool(folder / SPOOL_FILE) as spool:
        converted = convert(adapter, base=base, initial=initial, spool=spool, progress=progress)
        how = _conversion(adapter, initial, converted.known_to)
        _write(folder, converted.patch, base, Capture(method, {**(settings or {}), **how}, fitted_to))
    return load_patch(out)


def _write(folder: Path, patch: Patch[TensorInfo], base: Checkpoint, capture: Capture) -> None:
    tensors = digest_tensors(patch)
    write_patch(folder, patch, base_name=base.name, base_revision=base.revision)
    kept = identity_of_base(base, identify(base))
    write_record(folder, PatchRecord(__version__, kept, capture, ports=(), tensors=tensors, files={}))


def _conversion(
    adapter: Patch[TensorInfo], initial: Patch[TensorInfo] | None, known_to: Mapping[str, float]
) -> dict[str, object]:
    """How an adapter was converted, for the record."""
    began: dict[str, object] = {"began_with": adapter.config.changed_base or named_init(adapter.config.fields)}
    if initial is not None:
        return {**began, "initial": {"name": initial.name, "tensors": digest_tensors(initial)}}
    worst = max(known_to.values())
    return {**began, "initial": "computed from the base", "known_to": float(f"{worst:.2g}") if worst < 1 else 1.0}
