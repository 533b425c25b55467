"""A patch for an evolved model from the old tuned one: distilled on unlabelled prompts, with the record of both."""

from dataclasses import dataclass
from pathlib import Path

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import PlanRefusedError
from portllm.files.input_file import local_file, unchanged
from portllm.files.output_folder import check_apart
from portllm.files.record import encode
from portllm.matching.compatibility import base_refusals, mismatches
from portllm.patch.adapter_folder import files_of, folder_of
from portllm.patch.identify import identify
from portllm.patch.patch import Patch
from portllm.progress import Progress, silent
from portllm.running.examples import read_texts, read_with_digest
from portllm.running.folder import model_folder
from portllm.running.model import Device
from portllm.training.distil_lora import TeacherFolders, distil_lora
from portllm.training.lora import TrainReport, TrainSettings
from portllm.training.train import capture_training, origin_of


@dataclass(frozen=True, slots=True)
class Teacher:
    """The old tuned model.

    Attributes:
        base: The model that the patch belongs to.
        patch: The patch.
        max_new_tokens: Most tokens that it writes after a prompt.
    """

    base: Checkpoint
    patch: Patch[TensorInfo]
    max_new_tokens: int = 32


def distil(
    base: Checkpoint,
    *,
    data: Path,
    prompt: str,
    teacher: Teacher,
    out: Path,
    settings: TrainSettings | None = None,
    start: Patch[TensorInfo] | None = None,
    device: Device = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
) -> tuple[Patch[TensorInfo], TrainReport]:
    """Train a patch for a base to do what an older tuned model does, and write it to `out`.

    The teacher writes a completion after each prompt, and the loss is the mean divergence `KL(teacher ‖ student)` over
    its tokens; see `portllm.training.distil_lora`. No answer in the data is read.

    Args:
        base: The model to train on, of the same tokens as the teacher's.
        data: JSONL rows.
        prompt: Template of the prompt.
        teacher: What to learn from.
        out: The patch's folder.
        settings: Rank, learning rate and the like.
        start: A patch of `base` to train on, such as the teacher's, ported; its rank, alpha and modules are kept.
        device: Where to train.
        overwrite: Replace `out` if it exists.
        progress: Progress callback (generated answers, steps).

    Returns:
        The patch, opened from `out`, and what training did.

    Raises:
        DataError: Rows do not fit, or the models do not share their tokens.
        PlanRefusedError: The teacher's patch is not one of its base, or `start` cannot be trained on.
        NotFoundError: A model is a single file, without configuration and tokenizer.
        OutputExistsError: `out` exists; said before any work is done.
    """
    settings = settings or TrainSettings()
    check_teacher(teacher)
    check_apart(out, [local_file(data), *teacher.base.files, *files_of(teacher.patch)])
    prompts, digest = read_with_digest(data, lambda: read_texts(data, prompt))

    def run(model: Path, adapter: Path) -> TrainReport:
        old = TeacherFolders(
            model_folder(teacher.base, progress=progress), folder_of(teacher.patch), teacher.max_new_tokens
        )
        first = None if start is None else folder_of(start)
        with unchanged((*teacher.base.files, *files_of(teacher.patch))):
            return distil_lora(model, prompts, old, settings, adapter, device=device, start=first, progress=progress)

    recorded = {
        "prompt": prompt,
        **_answers_in(teacher.patch),
        "data": digest,
        "teacher": {
            "base": encode(identify(teacher.base)),
            "patch": origin_of(teacher.patch),
            "max_new_tokens": teacher.max_new_tokens,
        },
    }
    return capture_training(
        base, run, out=out, recorded=recorded, settings=settings, start=start, overwrite=overwrite, progress=progress
    )


def check_teacher(teacher: Teacher) -> None:
    """Raise PlanRefusedError if the teacher's patch is not one of its base, with every reason."""
    found = {*mismatches(teacher.patch, teacher.base), *base_refusals(teacher.patch, teacher.base, option="--teacher")}
    if found:
        raise PlanRefusedError(found)


def _answers_in(patch: Patch[TensorInfo]) -> dict[str, object]:
    """The field of the right answer, where the teacher knows it: for `evaluate`, not for training."""
    settings = patch.record.capture.settings if patch.record else {}
    return {"completion": settings["completion"]} if "completion" in settings else {}
