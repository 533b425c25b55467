"""A patch from an older tuned model instead of labels: distillation on unlabelled prompts.

The teacher writes a completion after each prompt, greedily (sequence-level distillation: Kim and Rush, 2016, arXiv
1606.07947); at each token of it and at its end mark the student learns the teacher's whole distribution and not just
the token (Hinton, Vinyals and Dean, 2015, arXiv 1503.02531, at temperature 1):

    loss = mean over completion tokens of KL(teacher ‖ student) = Σ_v p_T(v) (log p_T(v) - log p_S(v))
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from portllm.arrays import Float32, Int64
from portllm.errors import DataError
from portllm.files.output_folder import staged_folder
from portllm.progress import Progress, silent
from portllm.running.encoding import Encoded, Encoder, encode_rows
from portllm.running.examples import Border
from portllm.running.generation import write
from portllm.running.loss import IGNORED, completion_logits, completion_targets
from portllm.running.model import Device, PeftModel, attach_adapter, choose_device, load_model, load_tokenizer
from portllm.training.lora import fit_adapter
from portllm.training.settings import TrainReport, TrainSettings


@dataclass(frozen=True, slots=True)
class TeacherFolders:
    """The older tuned model.

    Attributes:
        base: Checkpoint folder of the older base.
        adapter: Folder of the adapter on it.
        max_new_tokens: Most tokens that it writes after a prompt; what it has not ended then has no end mark.
    """

    base: Path
    adapter: Path
    max_new_tokens: int


def distil_lora(
    base_folder: str | Path,
    prompts: Sequence[str],
    teacher: TeacherFolders,
    settings: TrainSettings,
    adapter_folder: str | Path,
    *,
    border: Border | None = None,
    device: Device = "auto",
    start: Path | None = None,
    progress: Progress = silent,
) -> TrainReport:
    """Trains an adapter on a base to do what an older tuned model does; both models are in memory.

    Args:
        base_folder: Checkpoint folder of the base to train on.
        prompts: Without answers.
        teacher: What to learn from.
        settings: Everything else; prompts are cut from the left to leave room for what the teacher writes.
        adapter_folder: The folder to be; a failed run leaves nothing there.
        border: How answers follow prompts.
        device: Where to train.
        start: An adapter to go on from, as in `train_lora`.
        progress: Progress callback (generated answers, steps).

    Returns:
        As `train_lora`, its losses being divergences in nats per token.

    Raises:
        CheckpointError: A model cannot be loaded.
        AdapterFormatError: An adapter does not fit.
        DataError: There are no prompts, a prompt does not fit, or the models do not share their tokens.
        OutputError: The adapter cannot be written; `OutputExistsError` if something is there.
        PortLLMError: The loss is not finite.
    """
    if not prompts:
        raise DataError("distillation: no prompts were given; expected at least one.")
    with staged_folder(Path(adapter_folder), overwrite=False) as staging:
        where = choose_device(device)
        encoder = Encoder(load_tokenizer(base_folder), border)
        _check_tokens(encoder, Encoder(load_tokenizer(teacher.base)))
        room = settings.max_tokens - teacher.max_new_tokens
        cut = encode_rows(
            prompts,
            lambda prompt: encoder.cut_prompt(encoder.encode_text(prompt), room=room),
            max_tokens=settings.max_tokens,
        )
        old = attach_adapter(
            load_model(teacher.base, device=where, longest=settings.max_tokens), teacher.adapter, name="teacher"
        )
        old.eval()
        rows: list[Encoded] = []
        for start_row in range(0, len(cut), settings.batch_size):
            batch = cut[start_row : start_row + settings.batch_size]
            rows += _written(old, encoder, batch, max_new_tokens=teacher.max_new_tokens, device=where)
            progress("write", len(rows), len(cut), "rows")

        def share(model: PeftModel, part: Sequence[Encoded], n_counted: int) -> torch.Tensor:
            with torch.no_grad():
                taught = completion_logits(old, part, device=where)
            learned, targets = completion_logits(model, part, device=where), completion_targets(part, device=where)
            return mean_divergence(taught, learned, targets) * (sum(row.n_counted for row in part) / n_counted)

        return fit_adapter(base_folder, rows, share, settings, staging, device=where, start=start, progress=progress)


def mean_divergence(
    teacher: Float32[torch.Tensor, "rows width vocabulary"],
    student: Float32[torch.Tensor, "rows width vocabulary"],
    targets: Int64[torch.Tensor, "rows width"],
) -> Float32[torch.Tensor, ""]:
    """The mean of `KL(teacher ‖ student)` over the places that have a target.

    Example:
        >>> logits = torch.zeros(1, 1, 2)
        >>> mean_divergence(logits, logits, torch.tensor([[1]])).item()
        0.0
    """
    here = targets != IGNORED
    taught, learned = teacher[here].log_softmax(dim=-1), student[here].log_softmax(dim=-1)
    return (taught.exp() * (taught - learned)).sum(dim=-1).mean()


@torch.inference_mode()
def _written(
    model: PeftModel,
    encoder: Encoder,
    prompts: Sequence[tuple[tuple[int, ...], int]],
    *,
    max_new_tokens: int,
    device: torch.device,
) -> Iterator[Encoded]:
    ids = [prompt for prompt, _ in prompts]
    written = write(model, encoder, ids, max_new_tokens=max_new_tokens, one_line=False, device=device)
    return (
        Encoded(prompt=prompt, completion=completion, n_cut=n_cut)
        for (prompt, n_cut), completion in zip(prompts, written, strict=True)
    )


def _check_tokens(student: Encoder, teacher: Encoder) -> None:
    """A distribution over tokens can be learned by a model that has the same ones."""
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab() or student.eos != teacher.eos:
        raise DataError(
            "the teacher and the student have different vocabularies, so their distributions cannot be compared. "
            "Let the older model answer the rows, and train on its answers as labels."
        )
