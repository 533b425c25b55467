"""Carry a patch to an evolved model: plan, run the method module by module, write the adapter with its new record."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from portllm import __version__
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import require_equal
from portllm.checkpoint.open import ModelLike, on_disk, open_checkpoint
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import refuse
from portllm.files.output_folder import check_apart, staged_folder
from portllm.matching.compatibility import taken_copies, taken_tie
from portllm.matching.port_plan import PortPlan
from portllm.matching.update import Update
from portllm.patch.adapter_folder import PatchLike, digest_tensors, load_patch, write_patch, write_record
from portllm.patch.finite import require_finite
from portllm.patch.patch import Patch
from portllm.patch.record import Capture, PatchRecord, PortStep
from portllm.porting.auto import Route


def port(
    patch: PatchLike,
    *,
    evolved: ModelLike,
    out: str | Path,
    base: ModelLike | None = None,
    method: str = "add",
    force: bool = False,
    allow_other_base: bool = False,
    overwrite: bool = False,
) -> Patch[TensorInfo]:
    """Carry a patch to an evolved model and write it to `out`, a folder that PEFT loads.

    Reads the headers and fingerprint samples of the models and the patch itself. Weights are read only for what the
    patch holds whole (saved modules, biases, token rows, DoRA magnitudes), which is re-based on the evolved ones, and
    for a copy of a base's weight that an adapter carries, which must be that weight. Where the tokenizers differ, what
    belongs to a token goes to the row that the token has in the evolved model.

    Args:
        patch: What to carry.
        evolved: Where to.
        out: The new patch's folder.
        base: The model the patch belongs to; needed where the patch does not say.
        method: A row of `METHODS`, or `auto`: the one that the verdict of `check` leads to, which needs `base`.
        force: With `auto`, port what will not hold.
        allow_other_base: Go on though `base` is not the one that the patch names.
        overwrite: Replace `out` where it exists.

    Returns:
        The ported patch, opened from `out`.

    Raises:
        PlanRefusedError: The patch does not fit, with every reason; by `auto`, also where it will not hold.
        PortError: There is no such method, or `force` is given with another than `auto`.
        OutputExistsError: `out` exists.
        OutputError: `out` cannot be written, or holds what is read.
        NonFiniteError: A tensor of the patch, or what becomes of it, holds an infinity or NaN.
    """
    update = Update(None if base is None else open_checkpoint(base), open_checkpoint(evolved))
    route = Route(update, method=method, force=force, allow_other_base=allow_other_base)
    return run_port(route.plan(load_patch(patch)), Path(out), overwrite=overwrite)


def run_port(plan: PortPlan, out: Path, *, overwrite: bool = False) -> Patch[TensorInfo]:
    """Carry out a plan; see `port`."""
    refuse(plan.refusals)
    check_apart(out, plan.files)
    require_finite(plan.patch)
    patch = plan.patch
    require_equal(() if plan.base is None else taken_copies(patch, plan.base))
    deltas = {module: plan.method.port(delta) for module, delta in patch.deltas.items()}
    ported = replace(patch, name=str(out), deltas=deltas)
    with staged_folder(out, overwrite=overwrite) as folder:
        if plan.base is None or (patch.is_relative and plan.tokens is None):
            _write(folder, plan, ported)
        else:
            _write_rebased(folder, plan, ported, base=plan.base)
    return load_patch(out)


def _write_rebased(folder: Path, plan: PortPlan, ported: Patch[TensorInfo], *, base: Checkpoint) -> None:
    # What is held whole needs weights, and so torch; most patches do without both.
    from portllm.checkpoint.reading.spool import SPOOL_FILE, Spool
    from portllm.porting.whole_values import rebase

    base, evolved = on_disk(base), on_disk(plan.evolved)
    require_equal((*taken_tie(plan.patch, base), *taken_tie(plan.patch, evolved)))
    with Spool(folder / SPOOL_FILE) as spool:
        moved = rebase(ported, base=base, evolved=evolved, tokens=plan.tokens, spool=spool)
        _write(folder, plan, moved.patch, left_out=moved.left_out)


def _write(
    folder: Path, plan: PortPlan, ported: Patch[TensorInfo], *, left_out: Mapping[str, tuple[str, ...]] | None = None
) -> None:
    """Write the ported patch and its record."""
    before = plan.patch.record
    record = PatchRecord(
        program=__version__,
        base=plan.target,
        capture=before.capture if before else Capture("adapter", {}),
        ports=(
            *(before.ports if before else ()),
            PortStep(plan.source, plan.target, plan.method.id, plan.evidence, left_out or {}, plan.choice),
        ),
        tensors=digest_tensors(ported),
        files={},
    )
    write_patch(folder, ported, base_name=plan.target.name, base_revision=plan.target.revision)
    write_record(folder, record)
