"""Will patches hold on the evolved model? From weights, and from prompts where there are some."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.checking.check import check as check_weights
from portllm.checking.report import CheckReport
from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.errors import PortLLMError
from portllm.patch.adapter_folder import PatchLike, load_patch
from portllm.progress import Progress, silent

if TYPE_CHECKING:
    from portllm.probing.passes import TextSettings
    from portllm.running.model import Device


def check(
    *patches: PatchLike,
    base: ModelLike,
    evolved: ModelLike,
    full: bool = False,
    places: bool = False,
    text: str | Path | Sequence[str] | None = None,
    prompt: str | None = None,
    settings: "TextSettings | None" = None,
    device: "Device" = "auto",
    allow_other_base: bool = False,
    progress: Progress = silent,
) -> CheckReport:
    """Say whether patches will hold on the evolved model, and why, from weights alone; `docs/check.md` has each number.

    With `text`, both models are run on prompts too, and the report says what the patches do there; that can put a patch
    in doubt.

    Args:
        *patches: What may be ported.
        base: The model that they belong to.
        evolved: The later version of it.
        full: Read every weight of both, instead of a few megabytes spread over all of them.
        places: Read every factor of the patches, too, and say where in the model they sit; no verdict depends on it.
        text: Prompts of the patches' domain that nobody has to answer, or their file: `.txt` with one a line, or JSONL.
        prompt: Template of the prompts in JSONL; None for the one that the patches were trained on.
        settings: How much of the prompts is looked at.
        device: Where models are run on them.
        allow_other_base: Go on though `base` is not the one that a patch names.
        progress: Told of the bytes that `full` reads, and of the prompts that were run.

    Raises:
        CheckpointError, RemoteError: A model cannot be read.
        PatchError: A patch cannot be read.
        DataError: The prompts do not fit, or there are fewer than two.
    """
    if not (isinstance(text, str | Path) or prompt is None) or (text is None and settings is not None):
        raise PortLLMError("check: prompt requires text to be a file of prompts, and settings require text. Omit it.")
    opened = [load_patch(patch) for patch in patches]
    old, new = (open_checkpoint(model, progress=progress) for model in (base, evolved))
    if isinstance(text, str | Path):
        from portllm.probing.probe import read_domain

        text = read_domain(Path(text), opened, template=prompt)
    report = check_weights(
        *opened,
        base=old,
        evolved=new,
        full=full,
        places=places,
        allow_other_base=allow_other_base,
        progress=progress,
    )
    if text is None:
        return report
    from portllm.probing.probe import add_text  # runs models, which weights alone do not need

    return add_text(
        report,
        opened,
        base=old,
        evolved=new,
        prompts=text,
        settings=settings,
        allow_other_base=allow_other_base,
        device=device,
        progress=progress,
    )
