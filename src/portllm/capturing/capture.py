"""Capture a patch: from an adapter, or from a base and what fine-tuning made of it."""

from pathlib import Path
from typing import TYPE_CHECKING, overload

from portllm.capturing.adapter import capture_adapter
from portllm.capturing.tuned_plan import Dense
from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import PortLLMError
from portllm.patch.adapter_folder import PatchLike, open_adapter
from portllm.patch.patch import Patch
from portllm.patch.record import FittedTo
from portllm.progress import Progress, silent

if TYPE_CHECKING:
    from portllm.capturing.tuned import TunedReport


@overload
def capture(
    adapter: PatchLike,
    *,
    base: ModelLike,
    out: str | Path,
    initial: PatchLike | None = None,
    fitted_to: FittedTo | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Patch[TensorInfo]: ...


@overload
def capture(
    *,
    tuned: ModelLike,
    base: ModelLike,
    out: str | Path,
    rank: int | None = None,
    max_rank: int | None = None,
    dense: Dense | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> "TunedReport": ...


def capture(
    adapter: PatchLike | None = None,
    *,
    base: ModelLike,
    out: str | Path,
    tuned: ModelLike | None = None,
    initial: PatchLike | None = None,
    fitted_to: FittedTo | None = None,
    rank: int | None = None,
    max_rank: int | None = None,
    dense: Dense | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> "Patch[TensorInfo] | TunedReport":
    """Write a patch that knows its base to `out`, a folder that PEFT loads.

    Args:
        adapter: A PEFT adapter that was trained on the base.
        base: What fine-tuning started from; every module and shape is checked against it.
        out: The patch's folder.
        tuned: In place of an adapter, what fine-tuning ended in, whole.
        initial: The adapter as it was before training, where it began with a part of the base's weights (PiSSA).
        fitted_to: How the base was quantized when the adapter was trained on it (QLoRA).
        rank: Of every delta from `tuned`; None keeps what is above the rounding noise of the two files.
        max_rank: Bounds the rank where `rank` is None.
        dense: Norms, biases, embeddings and heads of `tuned`: `keep` them whole (the default) or `drop` them.
        overwrite: Replace `out` where it exists.
        progress: Told of the work done.

    Returns:
        The patch, opened from `out`; with `tuned`, what was found of each tensor.

    Raises:
        PlanRefusedError: They do not go together, or there is nothing to write, with every reason.
        OutputExistsError: `out` exists.
        OutputError: `out` cannot be written, or holds what is read.
        NonFiniteError: A tensor holds an infinity or NaN.
    """
    if (adapter is None) == (tuned is None):
        raise PortLLMError("capture: pass either an adapter or the tuned model, not both.")
    alone = (
        {"rank": rank, "max_rank": max_rank, "dense": dense}
        if tuned is None
        else {"initial": initial, "fitted_to": fitted_to}
    )
    if stray := [name for name, value in alone.items() if value is not None]:
        other = "an adapter" if tuned is None else "a tuned model"
        raise PortLLMError(f"capture: {stray[0]} cannot be used with {other}. Omit it.")
    before, out = open_checkpoint(base, progress=progress), Path(out)
    if adapter is not None:
        return capture_adapter(
            open_adapter(adapter),
            base=before,
            out=out,
            initial=None if initial is None else open_adapter(initial),
            fitted_to=fitted_to,
            overwrite=overwrite,
            progress=progress,
        )
    if tuned is None:
        raise AssertionError("one of the two is given")
    from portllm.capturing.tuned import capture_tuned  # loads torch, which few adapters need

    after = open_checkpoint(tuned, progress=progress)
    return capture_tuned(
        before,
        after,
        out=out,
        rank=rank,
        max_rank=max_rank,
        dense=dense or "keep",
        overwrite=overwrite,
        progress=progress,
    )
