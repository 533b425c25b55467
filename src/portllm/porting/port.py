"""Port a patch to an evolved model: plan, run the method, write the adapter with its new record."""

from collections.abc import Mapping
from pathlib import Path

from portllm import __version__
from portllm.capturing.stored_values import settled
from portllm.checkpoint.model.equality import require_equal
from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import PortLLMError, refuse
from portllm.files.output_folder import check_apart, check_free, staged_folder
from portllm.matching.port_plan import PortPlan
from portllm.matching.update import Update
from portllm.patch.adapter_folder import PatchLike, digest_tensors, load_patch, write_patch, write_record
from portllm.patch.finite import require_finite
from portllm.patch.folders import Where, each
from portllm.patch.identify import identity_of_base
from portllm.patch.patch import Patch
from portllm.patch.record import Capture, PatchRecord, PortStep
from portllm.porting.auto import Route
from portllm.porting.inputs import gather, left_out, with_own


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
    """Port a patch to an evolved model and write it to `out`, a folder that PEFT loads.

    Reads the headers and fingerprint samples of the models and the patch itself. Weights are read only for what the
    patch stores in full (saved modules, biases, token rows, DoRA magnitudes), which is re-based on the evolved model,
    and for copies of base weights in the adapter, which must equal the base's. Where the tokenizers differ, rows that
    belong to a token move to that token's row in the evolved model.

    Args:
        patch: The patch to port.
        evolved: The updated base to port to.
        out: The new patch's folder.
        base: The model the patch belongs to; needed if the patch does not record it.
        method: A method of `METHODS`, or `auto`, which chooses one from the verdict of `check` and needs `base`.
        force: With `auto`, port even if the verdict is that the patch will not hold.
        allow_other_base: Accept a `base` other than the one the patch names.
        overwrite: Replace `out` if it exists.

    Returns:
        The ported patch, opened from `out`.

    Raises:
        PlanRefusedError: The patch does not match, or, with `auto`, will not hold; lists every reason.
        PortError: The method is unknown, or `force` is used without `auto`.
        OutputExistsError: `out` exists.
        OutputError: `out` cannot be written, or contains an input.
        NonFiniteError: A tensor of the patch, before or after porting, contains an infinity or NaN.
    """
    update = Update(None if base is None else open_checkpoint(base), open_checkpoint(evolved))
    route = Route(update, method=method, force=force, allow_other_base=allow_other_base)
    return run_port(route.plan(load_patch(patch)), Path(out), overwrite=overwrite)


def port_each(
    patches: Mapping[Where, PatchLike],
    *,
    evolved: ModelLike,
    base: ModelLike | None = None,
    method: str = "add",
    force: bool = False,
    allow_other_base: bool = False,
    overwrite: bool = False,
) -> dict[Where, Patch[TensorInfo] | PortLLMError]:
    """Port each of several patches to an evolved model; the models are read once for all patches.

    Each output is what `port` writes; a failing one does not stop the others.

    Args:
        patches: The patches to port, by output folder.
        evolved: The updated base to port to.
        base: As for `port`.
        method: As for `port`.
        force: As for `port`.
        allow_other_base: As for `port`.
        overwrite: As for `port`.

    Returns:
        For each folder the ported patch, or the error that `port` would have raised.

    Raises:
        PortError: The method is unknown, or `force` is used without `auto`.
    """
    update = Update(None if base is None else open_checkpoint(base), open_checkpoint(evolved))
    route = Route(update, method=method, force=force, allow_other_base=allow_other_base)
    return each(patches, lambda out, patch: run_port(route.plan(load_patch(patch)), Path(out), overwrite=overwrite))


def run_port(plan: PortPlan, out: Path, *, overwrite: bool = False) -> Patch[TensorInfo]:
    """Carry out a plan; see `port`."""
    require_port(plan, out, overwrite=overwrite)
    require_finite(plan.patch)
    require_equal(plan.taken)
    with staged_folder(out, overwrite=overwrite, inputs=plan.files) as folder:
        ported = plan.method.port(*gather(plan))
        with settled(with_own(plan, ported.patch), folder) as patch:
            for name, text in plan.beside.texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            write_patch(folder, patch, base_name=plan.target.name, base_revision=plan.target.revision)
            write_record(folder, _record(plan, patch, ported.evidence))
    return load_patch(out)


def require_port(plan: PortPlan, out: Path, *, overwrite: bool = False) -> None:
    """Raise what `run_port` would raise before it reads the patch."""
    refuse(plan.refusals)
    check_apart(out, plan.files)
    check_free(out, overwrite=overwrite)


def _record(plan: PortPlan, ported: Patch[TensorInfo], evidence: Mapping[str, float]) -> PatchRecord:
    before = plan.patch.record
    found = {**plan.evidence, **evidence}
    step = PortStep(plan.source, plan.target, plan.method.id, found, left_out(plan), plan.choice)
    return PatchRecord(
        program=__version__,
        base=identity_of_base(plan.evolved, plan.target),
        capture=before.capture if before else Capture("adapter", {}),
        ports=(*(before.ports if before else ()), step),
        tensors=digest_tensors(ported),
        files={},
        labels=plan.patch.labels,
        added_tokens={} if plan.carried_tokens is None else plan.carried_tokens.added,
    )
