"""Port a patch to an evolved model: plan, run the method, write the adapter with its new record."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from portllm import __version__
from portllm.capturing.stored_values import settled
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import require_equal
from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.errors import PortLLMError, Refusal, refuse
from portllm.files.kept_results import versions
from portllm.files.output_folder import check_apart, check_free, resumable_folder
from portllm.matching.in_step import not_in_step
from portllm.matching.port_plan import PortPlan
from portllm.matching.spelling import as_running
from portllm.matching.update import Update
from portllm.methods.contract import Need, Ported
from portllm.patch.adapter_folder import PatchLike, digest_tensors, load_patch, write_patch, write_record
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.card import write_patch_card
from portllm.patch.finite import require_finite
from portllm.patch.folders import Where, each
from portllm.patch.identify import identity_of_base
from portllm.patch.patch import Patch
from portllm.patch.record import Capture, PatchRecord, PortStep
from portllm.porting.auto import AUTO, Route
from portllm.porting.inputs import gather, left_out, with_own
from portllm.tensors.info import TensorInfo

if TYPE_CHECKING:
    from portllm.porting.domain import Domain

LEAST_COSINE = 0.5
"""Of a module's weights before and after an update. A drift as large as the weights leaves 0.7."""


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
    domain: "Domain | None" = None,
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
        domain: Prompts, for a method that runs both models over some (`align`).

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
    reads = domain is not None and method == AUTO
    route = Route(update, method=method, force=force, allow_other_base=allow_other_base, reads=reads)
    return run_port(route.plan(load_patch(patch)), Path(out), overwrite=overwrite, domain=domain)


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


def run_port(
    plan: PortPlan, out: Path, *, overwrite: bool = False, domain: "Domain | None" = None
) -> Patch[TensorInfo]:
    """Carry out a plan; see `port`."""
    require_port(plan, out, overwrite=overwrite, domain=domain)
    require_finite(plan.patch)
    require_equal(plan.taken)
    digest = None if domain is None else _digest(plan, domain)
    with resumable_folder(out, overwrite=overwrite, plan=digest, inputs=plan.files) as staged:
        folder, unfinished = staged.folder, None
        if domain is not None:
            from portllm.porting.unfinished import Unfinished  # loads torch, which most ports do without

            unfinished = Unfinished(staged)
        ported = plan.method.port(*gather(plan, domain, unfinished))
        if unfinished is not None:
            unfinished.clear()
        with settled(as_running(with_own(plan, ported.patch), plan.evolved), folder) as patch:
            for name, text in plan.beside.texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            write_patch(folder, patch, base_name=plan.target.name, base_revision=plan.target.revision)
            record = write_record(folder, _record(plan, patch, ported))
            write_patch_card(folder, patch, record, own=plan.patch.card, base=plan.evolved)
    return load_patch(out)


def require_port(plan: PortPlan, out: Path, *, overwrite: bool = False, domain: "Domain | None" = None) -> None:
    """Raise what `run_port` would raise before it reads the patch."""
    refuse((*plan.refusals, *_unasked(plan, domain)))
    check_apart(out, plan.files)
    check_free(out, overwrite=overwrite)


def _unasked(plan: PortPlan, domain: "Domain | None") -> Iterator[Refusal]:
    """Why a method cannot run both models over prompts, or has no use for any."""
    runs = Need.STREAMS in plan.method.needs_for(plan.patch)
    if runs and domain is None:
        yield Refusal(
            "--text", f"method '{plan.method.id}' runs both models over prompts: pass them with --text, or --draw."
        )
    if domain is not None and not runs:
        yield Refusal("--text", f"method '{plan.method.id}' reads no prompts. Omit it.")
    if runs:
        yield from not_in_step(plan, method=plan.method.id)
    if (why := plan.method.refuses(plan.patch)) is not None:
        yield Refusal("--method", f"{plan.patch.name} {why}. Method '{plan.method.id}' cannot carry it.")
    keeps_factors = runs and Need.PAIRS not in plan.method.needs
    if keeps_factors and plan.base is not None and (others := _unrelated(plan.patch, plan.base, plan.evolved)):
        yield Refusal(
            "--evolved",
            f"the weights of {len(others)} of {len(plan.patch.deltas)} patched modules, such as '{others[0]}', "
            f"have nothing in common with those of {plan.base.name}: another model, or its units in another order or "
            f"basis. Method '{plan.method.id}' carries what a patch reads as it is, which would mean nothing there; "
            "--method transport takes it to the other basis.",
        )


def _unrelated(patch: Patch[TensorInfo], base: Checkpoint, evolved: Checkpoint) -> list[str]:
    """The modules whose weights no update can have taken from the one to the other, by their samples."""
    update = Update(base, evolved)
    return [name for name in patch.deltas if update.window_sums([name + WEIGHT]).cosine < LEAST_COSINE]


def _digest(plan: PortPlan, domain: "Domain") -> str:
    """Of all that an aligned port depends on: a run that died goes on only with the same."""
    depends = {
        "method": plan.method.id,
        "models": [plan.source.fingerprint, plan.target.fingerprint],
        "patch": [digest_tensors(plan.patch), dict(plan.patch.config.fields)],
        "domain": domain.identity,
        "versions": dict(versions()),
    }
    return blake3(json.dumps(depends, sort_keys=True, default=repr).encode()).hexdigest()


def _record(plan: PortPlan, ported: Patch[TensorInfo], done: Ported) -> PatchRecord:
    before = plan.patch.record
    found = {**plan.evidence, **done.evidence}
    method = plan.method.id if done.how is None else f"{plan.method.id}: {done.how}"
    step = PortStep(plan.source, plan.target, method, found, left_out(plan), plan.choice, done.tried)
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
