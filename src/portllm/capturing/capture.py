"""Capture a patch from an adapter, or from a base and its fine-tuned model."""

from pathlib import Path
from typing import TYPE_CHECKING, overload

from portllm.capturing.adapter import capture_adapter
from portllm.capturing.tuned_plan import Dense
from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.errors import PortLLMError
from portllm.patch.adapter_folder import PatchLike, open_adapter
from portllm.patch.patch import Patch
from portllm.patch.record import FittedTo
from portllm.progress import Progress, silent
from portllm.running.examples import recorded_wording
from portllm.tensors.info import TensorInfo

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
    prompt: str | None = None,
    completion: str | None = None,
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
    prompt: str | None = None,
    completion: str | None = None,
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
    prompt: str | None = None,
    completion: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> "Patch[TensorInfo] | TunedReport":
    """Capture a patch and write it to `out`, a folder that PEFT loads.

    Args:
        adapter: A PEFT adapter trained on the base.
        base: The model that was fine-tuned; every module and shape is checked against it.
        out: The patch's folder.
        tuned: Instead of an adapter, the fine-tuned model.
        initial: The adapter before training, if it was initialized from the base's weights (PiSSA, OLoRA).
        fitted_to: How the base was quantized when the adapter was trained on it (QLoRA).
        rank: Rank of the deltas extracted from `tuned`; None keeps what exceeds the rounding noise of the two files.
        max_rank: Upper limit where `rank` is None.
        dense: `keep` (the default) or `drop` changes to norms, biases, embeddings and heads of `tuned`.
        prompt: Prompt template of the training data, recorded so that `evaluate` and `certify` ask the same way.
        completion: Field with the right answer, recorded likewise.
        overwrite: Replace `out` if it exists.
        progress: Progress callback.

    Returns:
        The patch, opened from `out`; with `tuned`, also a report of each tensor.

    Raises:
        DataError: The prompt template is broken, or shows the answer.
        PlanRefusedError: The inputs do not match, or there is nothing to write; lists every reason.
        OutputExistsError: `out` exists.
        OutputError: `out` cannot be written, or contains an input.
        NonFiniteError: A tensor contains an infinity or NaN.
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
    if completion is not None and prompt is None:
        raise PortLLMError("capture: completion requires prompt.")
    settings = recorded_wording(prompt, completion)
    before, out = open_checkpoint(base, progress=progress), Path(out)
    if adapter is not None:
        return capture_adapter(
            open_adapter(adapter),
            base=before,
            out=out,
            initial=None if initial is None else open_adapter(initial),
            settings=settings,
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
        settings=settings,
        overwrite=overwrite,
        progress=progress,
    )
