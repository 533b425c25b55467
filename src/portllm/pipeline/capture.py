"""Capture a patch: write down, beside an adapter, which base it belongs to."""

from collections.abc import Mapping
from pathlib import Path

from portllm import __version__
from portllm.checkpoint.header import TensorInfo
from portllm.checkpoint.reader import Checkpoint
from portllm.checkpoint.writer import check_apart, staged_folder
from portllm.errors import PlanRefusedError, Refusal
from portllm.patch.adapter_folder import digest_tensors, files_of, load_patch, write_patch, write_record
from portllm.patch.patch import Patch
from portllm.patch.record import Capture, PatchRecord
from portllm.pipeline.fit import altered_copies, misfits
from portllm.pipeline.update import identify


def plan_capture(adapter: Patch[TensorInfo], *, base: Checkpoint) -> tuple[Refusal, ...]:
    """Every reason why an adapter cannot be captured as a patch of this base."""
    refusals = [*misfits(adapter, base), *altered_copies(adapter, base)]
    if adapter.record is not None:
        refusals.append(
            Refusal(
                "--adapter",
                f"{adapter.name} is a patch already: its patch.json names {adapter.record.base.name} as its base. Use "
                "it as it is; 'portllm port' carries it to another base.",
            )
        )
    return tuple(sorted(refusals))


def capture_adapter(
    adapter: Patch[TensorInfo],
    *,
    base: Checkpoint,
    out: Path,
    method: str = "adapter",
    settings: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> Patch[TensorInfo]:
    """Write an adapter to `out` as a patch that knows its base.

    Args:
        adapter: A PEFT folder without a record, opened with `load_patch`.
        base: The model it was made on; every module and shape is checked against it.
        out: The patch's folder.
        method: How the adapter came to be, for the record.
        settings: What shaped it, for the record.
        overwrite: Replace `out` where it exists.

    Raises:
        PlanRefusedError: The adapter does not fit the base, with every reason.
        OutputExistsError: `out` exists.
        OutputError: `out` cannot be written, or holds what is read.
    """
    refusals = plan_capture(adapter, base=base)
    if refusals:
        raise PlanRefusedError(refusals)
    check_apart(out, (*base.files, *files_of(adapter)))
    record = PatchRecord(
        base=identify(base),
        capture=Capture(method, dict(settings or {})),
        ports=(),
        tensors=digest_tensors(adapter),
        program=__version__,
    )
    with staged_folder(out, overwrite=overwrite) as folder:
        write_patch(folder, adapter, base_name=base.name, base_revision=base.revision)
        write_record(folder, record)
    return load_patch(out)
