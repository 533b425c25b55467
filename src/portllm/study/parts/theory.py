"""The paper's theory measured for one patch on one evolved model: residual, loss line, expansion; as JSON values."""

from collections.abc import Sequence
from dataclasses import dataclass

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.patch.adapter_folder import folder_of
from portllm.patch.patch import Patch
from portllm.probing.expansion import expand
from portllm.probing.port_residual import port_residual
from portllm.probing.settings import SKETCH
from portllm.progress import Progress, silent
from portllm.running.encoding import Encoder
from portllm.running.folder import model_folder
from portllm.running.loss_line import LossLine, measure_line
from portllm.running.model import (
    Device,
    PeftModel,
    add_adapter,
    attach_adapter,
    choose_device,
    load_model,
    load_tokenizer,
)
from portllm.running.ranges import require_ranges
from portllm.study.parts.task import TaskSource
from portllm.tensors.info import TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class TheorySettings:
    """Everything that the measures depend on but models, patches and rows.

    Attributes:
        gradient_rows: Rows of the task's training data that gradients are taken on; the last ones.
        max_tokens: Most tokens of these.
        batch_size: Rows of a pass.
        points: Of the line between ported and retrained patch, rising from 0 to 1.
        sketch: Columns of the sketches of curvature.
        seed: Of what is drawn.

    Raises:
        PortLLMError: A value is out of its range; all of them are named.
    """

    gradient_rows: int = 32
    max_tokens: int = 512
    batch_size: int = 4
    points: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    sketch: int = SKETCH
    seed: int = 0

    def __post_init__(self) -> None:
        rising = all(before < after for before, after in zip(self.points, self.points[1:], strict=False))
        ends = (self.points[0], self.points[-1]) if len(self.points) > 1 else ()
        require_ranges(
            "theory settings",
            ("gradient_rows", self.gradient_rows, "1 or more", self.gradient_rows >= 1),
            ("max_tokens", self.max_tokens, "2 or more", self.max_tokens >= 2),
            ("batch_size", self.batch_size, "1 or more", self.batch_size >= 1),
            ("points", self.points, "rising from 0 to 1", rising and ends == (0.0, 1.0)),
            ("sketch", self.sketch, "1 or more", self.sketch >= 1),
        )


def measure_theory(
    base: Checkpoint,
    evolved: Checkpoint,
    patch: Patch[TensorInfo],
    retrained: Patch[TensorInfo],
    *,
    source: TaskSource,
    settings: TheorySettings | None = None,
    device: Device = "auto",
    progress: Progress = silent,
) -> dict[str, object]:
    """What the paper's theory is about, in numbers; `docs/theory.md` says how to read them.

    Args:
        base: The model that the patch was made on.
        evolved: The later version.
        patch: The patch, whose delta is carried over as it is.
        retrained: A patch trained on the evolved model, of the same modules.
        source: The task of both patches.
        settings: Everything else.
        device: Where models run.
        progress: Progress callback (parts).

    Returns:
        `residual` as in `PortResidual.to_json`, `line` as in `LossLine.to_json`, on the rows that the task scores, and
        `expansion` as in `Expansion.to_json`.

    Raises:
        PlanRefusedError: A patch does not fit, or holds more than LoRA deltas of linear modules.
        DataError: Rows do not fit.
    """
    settings = settings or TheorySettings()
    residual = port_residual(evolved, patch, retrained, seed=settings.seed, progress=progress)
    expansion = expand(
        base,
        evolved,
        patch,
        source.train_examples()[-settings.gradient_rows :],
        max_tokens=settings.max_tokens,
        batch_size=settings.batch_size,
        sketch=settings.sketch,
        seed=settings.seed,
        device=device,
        progress=progress,
    )
    line = _line(evolved, patch, retrained, source, settings.points, device=device, progress=progress)
    return {"residual": residual.to_json(), "line": line.to_json(), "expansion": expansion.to_json()}


def _line(
    evolved: Checkpoint,
    patch: Patch[TensorInfo],
    retrained: Patch[TensorInfo],
    source: TaskSource,
    points: Sequence[float],
    *,
    device: Device,
    progress: Progress,
) -> LossLine:
    where, folder = choose_device(device), model_folder(evolved, progress=progress)
    encoder = Encoder(load_tokenizer(folder))
    model = attach_adapter(load_model(folder, device=where, longest=source.longest), folder_of(patch), name="ported")
    add_adapter(model, folder_of(retrained), name="retrained")
    model.eval()
    done = 0

    def losses_of(blend: PeftModel) -> Sequence[float]:
        nonlocal done
        losses = source.score(blend, encoder, device=where, tick=lambda _: None).losses
        done += 1
        progress("line", done, len(points), "steps")
        return losses

    return measure_line(model, "ported", "retrained", points=points, losses_of=losses_of)
