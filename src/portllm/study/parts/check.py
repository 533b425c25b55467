"""What `check` says of a patch before it is ported: its verdict and its measures, as JSON values."""

from collections.abc import Sequence
from dataclasses import dataclass

from portllm.checking.forecast_features import weight_features
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.patch.patch import Patch
from portllm.probing.check import check
from portllm.probing.probe import LEAST_PROMPTS
from portllm.probing.settings import TextSettings
from portllm.progress import Progress, silent
from portllm.running.examples import Example
from portllm.running.model import Device
from portllm.running.ranges import require_ranges
from portllm.tensors.info import TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSettings:
    """Everything that the measures depend on but models, patch and prompts.

    Attributes:
        full: Read every weight of both models, instead of a few megabytes of each.
        prompts: Prompts that models are run on, of the first of the task's rows to train on; 0 to measure weights
            alone.
        max_tokens: Most tokens of a prompt.
        batch_size: Prompts of a pass.
        gradients: Measure the terms of the loss, too: backward passes.

    Raises:
        PortLLMError: A value is out of its range; all of them are named.
    """

    full: bool = False
    prompts: int = 0
    max_tokens: int = 512
    batch_size: int = 16
    gradients: bool = False

    def __post_init__(self) -> None:
        enough = self.prompts == 0 or self.prompts >= LEAST_PROMPTS
        require_ranges(
            "check settings",
            ("prompts", self.prompts, f"0, or {LEAST_PROMPTS} or more", enough),
            ("max_tokens", self.max_tokens, "2 or more", self.max_tokens >= 2),
            ("batch_size", self.batch_size, "1 or more", self.batch_size >= 1),
        )


def measure_check(
    base: Checkpoint,
    evolved: Checkpoint,
    patch: Patch[TensorInfo],
    examples: Sequence[Example],
    settings: CheckSettings,
    *,
    device: Device = "auto",
    progress: Progress = silent,
) -> dict[str, object]:
    """What is known of a patch on an update before anything is ported.

    Args:
        base: The model that the patch was made on.
        evolved: The later version.
        patch: The patch.
        examples: Rows of its task; their completions are not looked at.
        settings: Everything else.
        device: Where models run.
        progress: Progress callback (parts).

    Returns:
        `verdict`, the texts of its `reasons`, and `weights` and `text`: measures by name, as in `weight_features` and
        `TextMeasures.features`; `text` is empty where no prompts are asked for.

    Raises:
        DataError: There are fewer prompts than are asked for.
    """
    prompts = [example.prompt for example in examples[: settings.prompts]]
    limits = TextSettings(max_tokens=settings.max_tokens, batch_size=settings.batch_size, gradients=settings.gradients)
    report = check(
        patch,
        base=base,
        evolved=evolved,
        full=settings.full,
        text=prompts or None,
        settings=limits if prompts else None,
        device=device,
        progress=progress,
    )
    (found,) = report.patches
    return {
        "verdict": str(found.verdict.answer),
        "reasons": [reason.text for reason in found.verdict.reasons],
        "weights": weight_features(report.update, found),
        "text": {} if found.text is None else found.text.features(),
    }
