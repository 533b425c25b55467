"""Train a first patch: LoRA fine-tuning on prompts and completions.

A short loop of our own, so that a run is a function of base, rows and settings: AdamW on float32 factors, the base
frozen in its stored dtype, the loss on the tokens of the completion and its end mark only, the adapter written as PEFT
does.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from portllm.errors import DataError
from portllm.files.output_folder import staged_folder
from portllm.progress import Progress, silent
from portllm.running.chat import Chat
from portllm.running.chat_template import read_chat_template
from portllm.running.encoding import Encoded, Encoder
from portllm.running.examples import Border
from portllm.running.loss import completion_nats
from portllm.running.model import (
    Device,
    PeftModel,
    PreTrainedModel,
    add_fresh_lora,
    choose_device,
    continue_lora,
    load_model,
    load_tokenizer,
    save_adapter,
    save_memory,
)
from portllm.running.ranges import require_ranges
from portllm.running.shapes import Content, Conversation
from portllm.training.descent import descend
from portllm.training.schedule import Decay, bucketed_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Settings of a training run.

    Attributes:
        rank: LoRA rank.
        alpha: PEFT's numerator: the scale is `alpha / rank`, or `alpha / sqrt(rank)` with `use_rslora`.
        target_modules: Names of the linear modules; `all-linear` is all but the head: in a Llama the paper's seven.
        use_rslora: Use the rank-stabilized scale.
        dropout: LoRA dropout.
        learning_rate: Peak learning rate.
        epochs: Number of passes over the data, unless `steps` is given.
        steps: Number of optimizer steps, instead of `epochs`.
        batch_size: Rows per optimizer step.
        max_tokens: Maximum tokens per row; longer prompts are truncated from the left.
        warmup: Fraction of the steps during which the learning rate rises.
        decay: Learning-rate schedule after warmup.
        weight_decay: AdamW weight decay.
        max_grad_norm: Gradient clipping norm.
        gradient_checkpointing: Trade about a third more time for less memory.
        seed: Random seed of initialization, row order and dropout.

    Raises:
        PortLLMError: A value is out of range; all of them are named.
    """

    rank: int = 8
    alpha: int = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    dropout: float = 0.0
    learning_rate: float = 2e-4
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    max_tokens: int = 512
    warmup: float = 0.1
    decay: Decay = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require_ranges(
            "training settings",
            ("rank", self.rank, "1 or more", self.rank >= 1),
            ("alpha", self.alpha, "1 or more", self.alpha >= 1),
            ("dropout", self.dropout, "0 to below 1", 0 <= self.dropout < 1),
            ("learning_rate", self.learning_rate, "more than 0", 0 < self.learning_rate < math.inf),
            ("epochs", self.epochs, "more than 0", 0 < self.epochs < math.inf),
            ("steps", self.steps, "1 or more", self.steps is None or self.steps >= 1),
            ("batch_size", self.batch_size, "1 or more", self.batch_size >= 1),
            ("max_tokens", self.max_tokens, "2 or more", self.max_tokens >= 2),
            ("warmup", self.warmup, "0 to below 1", 0 <= self.warmup < 1),
            ("weight_decay", self.weight_decay, "0 or more", self.weight_decay >= 0),
            ("max_grad_norm", self.max_grad_norm, "more than 0", self.max_grad_norm > 0),
        )


BatchLoss = Callable[[PeftModel, Sequence[Encoded]], torch.Tensor]
"""The mean loss of a model on a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """Report of a training run.

    Attributes:
        losses: Mean loss of each step's batch, in nats per token of completion and end mark.
        seconds: Duration of the steps, excluding loading and saving.
        n_trained: Number of trained parameters.
        n_rows: Number of rows.
        n_cut_rows: Number of rows whose prompt was truncated.
        n_tokens: Number of tokens processed, excluding padding.
        steps: Number of optimizer steps.
        device: The device it ran on.
        peak_bytes: Peak memory on a CUDA device; None on a CPU.
    """

    losses: tuple[float, ...]
    seconds: float
    n_trained: int
    n_rows: int
    n_cut_rows: int
    n_tokens: int
    steps: int
    device: str
    peak_bytes: int | None

    def __repr__(self) -> str:
        ends = f", loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f}" if self.losses else ""
        return f"TrainReport({self.steps} steps on {self.n_rows} rows{ends}, {self.seconds:.1f} s)"


def train_lora(
    base_folder: str | Path,
    examples: Sequence[Content],
    settings: TrainSettings,
    adapter_folder: str | Path,
    *,
    border: Border | None = None,
    device: Device = "auto",
    start: Path | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> TrainReport:
    """Trains a LoRA adapter on a base and writes it as a PEFT folder.

    The loss of a step is the mean of `-log p(token | all before it)` over the completion and end-mark tokens of its
    rows; of conversations over the tokens of the assistant's turns, of texts over all tokens.
    On a CPU, the same base, rows and settings give the same bytes.

    Args:
        base_folder: Checkpoint folder of the base.
        examples: Prompts and completions; conversations, for a base with a chat template; or whole texts.
        settings: Everything else.
        adapter_folder: The folder to be; a failed run leaves nothing there.
        border: How completions follow prompts.
        device: Where to train.
        start: An adapter folder whose factors are trained on, instead of new ones; its rank, alpha and modules count,
            and not those of the settings.
        overwrite: Replace what is at `adapter_folder`.
        progress: Progress callback (steps).

    Raises:
        CheckpointError: The base cannot be loaded.
        AdapterFormatError: The target modules are not in the base, or `start` does not fit it.
        DataError: There are no examples, or completions that do not fit into `max_tokens`.
        OutputError: The adapter cannot be written; `OutputExistsError` if something is there.
        PortLLMError: The loss is not finite.
    """
    if not examples:
        raise DataError("training: no examples were given; expected at least one.")
    with staged_folder(Path(adapter_folder), overwrite=overwrite) as staging:
        where = choose_device(device)
        is_chat = any(isinstance(example, Conversation) for example in examples)
        template = read_chat_template(Path(base_folder)) if is_chat else ""
        encoder = Encoder(load_tokenizer(base_folder), border)
        ended = [
            row if row.counted is not None or row.completion[-1] == encoder.eos
            else replace(row, completion=(*row.completion, encoder.eos))
            for row in encode_all(encoder, examples, max_tokens=settings.max_tokens, template=template)
        ]  # fmt: skip

        def mean_nats(model: PeftModel, batch: Sequence[Encoded]) -> torch.Tensor:
            return completion_nats(model, batch, device=where).sum() / sum(row.n_counted for row in batch)

        return fit_adapter(
            base_folder, ended, mean_nats, settings, staging, device=where, start=start, progress=progress
        )


def fit_adapter(
    base_folder: str | Path,
    rows: Sequence[Encoded],
    loss_of: BatchLoss,
    settings: TrainSettings,
    folder: Path,
    *,
    device: torch.device,
    start: Path | None,
    progress: Progress,
) -> TrainReport:
    """Trains an adapter on encoded rows and writes it into a folder.

    Args:
        base_folder: Checkpoint folder of the base.
        rows: Prompts and completions, the end mark with them.
        loss_of: The mean loss of the model on a batch of rows.
        settings: Everything else.
        folder: Takes the adapter's files.
        device: Where to train.
        start: An adapter to go on from, or None for a new one.
        progress: Progress callback (steps).
    """
    # LoRA's factors and dropout draw from torch's global generator; the caller's state is put back afterwards.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(settings.seed)
        base = load_model(base_folder, device=device, longest=settings.max_tokens)
        model = _fresh(base, settings) if start is None else continue_lora(base, start, dropout=settings.dropout)
        report = _fit(model, rows, loss_of, settings, device=device, progress=progress)
    save_adapter(model, folder)
    return report


def _fresh(base: PreTrainedModel, settings: TrainSettings) -> PeftModel:
    return add_fresh_lora(
        base,
        rank=settings.rank,
        alpha=settings.alpha,
        target_modules=settings.target_modules,
        use_rslora=settings.use_rslora,
        dropout=settings.dropout,
    )


def encode_all(encoder: Encoder, examples: Sequence[Content], *, max_tokens: int, template: str = "") -> list[Encoded]:
    """The examples as ids that fit into `max_tokens` together with an end mark.

    Args:
        encoder: Of the model.
        examples: What is to be learned.
        max_tokens: Most ids of a row.
        template: The chat template of conversations, which has end marks of its own.

    Raises:
        DataError: Some do not; all are counted, the first ten shown.
    """
    chat = Chat(encoder, template)
    rows: list[Encoded] = []
    problems: list[str] = []
    for number, example in enumerate(examples, start=1):
        try:
            match example:
                case Conversation():
                    rows.append(chat.encode(example, max_tokens=max_tokens))
                case str():
                    rows.append(encoder.encode_whole(example, max_tokens=max_tokens, reserve=1))
                case _:
                    rows.append(encoder.encode(example.prompt, example.completion, max_tokens=max_tokens, reserve=1))
        except DataError as error:
            problems.append(f"  example {number}: {error}")
    if problems:
        more = [f"  and {len(problems) - 10} more."] if len(problems) > 10 else []
        raise DataError("\n".join([f"{len(problems)} of {len(examples)} examples are invalid:", *problems[:10], *more]))
    return rows


def _fit(
    model: PeftModel,
    rows: Sequence[Encoded],
    loss_of: BatchLoss,
    settings: TrainSettings,
    *,
    device: torch.device,
    progress: Progress,
) -> TrainReport:
    if settings.gradient_checkpointing:
        save_memory(model)
    steps = settings.steps or math.ceil(settings.epochs * math.ceil(len(rows) / settings.batch_size))
    batches = [[rows[index] for index in batch] for batch in itertools.islice(_batches(rows, settings), steps)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    losses = descend(model, batches, partial(loss_of, model), settings, label="train", progress=progress)
    return TrainReport(
        losses=losses,
        seconds=time.perf_counter() - began,
        n_trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        n_rows=len(rows),
        n_cut_rows=sum(row.n_cut > 0 for row in rows),
        n_tokens=sum(len(row.prompt) + len(row.completion) for batch in batches for row in batch),
        steps=steps,
        device=str(device),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _batches(rows: Sequence[Encoded], settings: TrainSettings) -> Iterator[list[int]]:
    lengths = [len(row.prompt) + len(row.completion) for row in rows]
    for epoch in itertools.count():
        yield from bucketed_batches(lengths, batch_size=settings.batch_size, seed=settings.seed, epoch=epoch)
