"""Check whether patches will hold on the evolved model, from weights and optionally from prompts."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path

from portllm.checking.check import check_weights
from portllm.checking.forecast import with_forecast
from portllm.checking.prompts.measures import TextMeasures
from portllm.checking.report import CheckReport, PatchReport
from portllm.checking.update.report import UpdateReport
from portllm.checking.verdict import Answer, with_answers
from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.errors import PortLLMError
from portllm.patch.adapter_folder import PatchLike, load_patch
from portllm.probing.domain import read_domain
from portllm.probing.settings import TextSettings
from portllm.progress import Progress, silent
from portllm.running.data import Data, chat_template_for
from portllm.running.device import Device
from portllm.running.examples import Border
from portllm.running.folder import check_runnable, model_folder


def check(
    *patches: PatchLike,
    base: ModelLike,
    evolved: ModelLike,
    trained_on: ModelLike | None = None,
    full: bool = False,
    places: bool = False,
    text: str | Path | Data | Sequence[str] | None = None,
    prompt: str | None = None,
    settings: TextSettings | None = None,
    device: Device = "auto",
    allow_other_base: bool = False,
    progress: Progress = silent,
) -> CheckReport:
    """Check whether patches will hold on the evolved model, and why; `docs/check.md` explains each number.

    Without `text`, only weights are read. With `text`, both models are also run on prompts, and the report says how the
    patches behave there, which can lower the verdict.

    Args:
        *patches: The patches to check.
        base: The model that they belong to.
        evolved: The updated base.
        trained_on: The base that ported patches were trained on: the drift since then is measured instead of bounded.
        full: Read every weight of both models instead of a few megabytes of each.
        places: Also read every factor of the patches and report where they are; does not affect the verdict.
        text: Unlabeled prompts from the patches' domain, or their file: `.txt` with one per line, or rows.
        prompt: Prompt template for rows; None for the one recorded in the patches, or for the shape of the rows.
        settings: Limits for running the prompts.
        device: Device to run the models on.
        allow_other_base: Accept a `base` other than the one a patch names.
        progress: Progress callback (bytes read by `full`, prompts run).

    Raises:
        CheckpointError, RemoteError: A model cannot be read.
        PatchError: A patch cannot be read.
        DataError: The prompts are invalid, or there are fewer than two.
    """
    if not (isinstance(text, str | Path) or prompt is None) or (text is None and settings is not None):
        raise PortLLMError("check: prompt requires text to be a file of prompts, and settings require text. Omit it.")
    opened = [load_patch(patch) for patch in patches]
    old, new = (open_checkpoint(model, progress=progress) for model in (base, evolved))
    found = read_domain(Path(text), opened, template=prompt) if isinstance(text, str | Path) else text
    if found is not None:
        check_runnable(old)
        check_runnable(new)
    if isinstance(found, Data) and old.folder is not None:
        chat_template_for(found, *opened, folder=old.folder)
    report = check_weights(
        *opened,
        base=old,
        evolved=new,
        trained_on=None if trained_on is None else open_checkpoint(trained_on, progress=progress),
        full=full,
        places=places,
        allow_other_base=allow_other_base,
        progress=progress,
    )
    if found is None:
        return report
    from portllm.probing.probe import measure_text  # runs models, which weights alone do not need
    from portllm.running.wording import word

    prompts: Sequence[str]
    border: Border | None
    if isinstance(found, Data):
        folder = model_folder(old, progress=progress)
        asked = word(found, folder, chat_template_for(found, *opened, folder=folder))
        prompts, border = asked.prompts, asked.border
    else:
        prompts, border = found, None
    fits = [found.verdict.answer is not Answer.CANNOT_BE_PORTED for found in report.patches]
    if not any(fits):
        return report
    measured = iter(
        measure_text(
            old,
            new,
            list(compress(opened, fits)),
            prompts,
            border=border,
            settings=settings,
            allow_other_base=allow_other_base,
            device=device,
            progress=progress,
        )
    )
    checked = zip(report.patches, fits, strict=True)
    more = (_with_text(report.update, one, next(measured)) if fit else one for one, fit in checked)
    return replace(report, patches=tuple(more))


def _with_text(update: UpdateReport, report: PatchReport, text: TextMeasures) -> PatchReport:
    """A patch's report with what prompts say of it, and with the doubts that they raise."""
    agreement = text.outputs.specialist_to_ported.agreement
    verdict = with_answers(report.verdict, agreement=agreement, n_prompts=text.n_prompts)
    return with_forecast(update, replace(report, text=text, verdict=verdict))
