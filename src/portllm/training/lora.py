"""Train a first patch: LoRA fine-tuning on prompts and completions.

A short loop of our own, so that a run is a function of base, rows and settings: AdamW on float32 factors, the base
frozen in its stored dtype, the loss on the tokens of the completion and its end mark only, the adapter written as PEFT
does.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from portllm.errors import DataError
from portllm.files.output_folder import staged_folder
from portllm.progress import Progress, silent
from portllm.running.chat import Chat
from portllm.running.encoding import Encoded, Encoder, encode_rows, together
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
from portllm.running.shapes import Content, Conversation
from portllm.training.descent import descend
from portllm.training.schedule import bucketed_batches
from portllm.training.settings import TrainReport, TrainSettings

LossShare = Callable[[PeftModel, Sequence[Encoded], int], torch.Tensor]
"""What some rows of a batch have in its mean loss, given how many tokens of the batch are to be learned."""


def train_lora(
    base_folder: str | Path,
    examples: Sequence[Content],
    settings: TrainSettings,
    adapter_folder: str | Path,
    *,
    border: Border | None = None,
    template: str = "",
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
        examples: Prompts and completions; conversations; or whole texts.
        settings: Everything else.
        adapter_folder: The folder to be; a failed run leaves nothing there.
        border: How completions follow prompts.
        template: The chat template of conversations.
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
        encoder = Encoder(load_tokenizer(base_folder), border)
        ended = [
            row if row.counted is not None or row.completion[-1] == encoder.eos
            else replace(row, completion=(*row.completion, encoder.eos))
            for row in encode_all(encoder, examples, max_tokens=settings.max_tokens, template=template)
        ]  # fmt: skip

        def share(model: PeftModel, part: Sequence[Encoded], n_counted: int) -> torch.Tensor:
            return completion_nats(model, part, device=where).sum() / n_counted

        return fit_adapter(base_folder, ended, share, settings, staging, device=where, start=start, progress=progress)


def fit_adapter(
    base_folder: str | Path,
    rows: Sequence[Encoded],
    share: LossShare,
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
        share: The loss of the model, row by row summed and divided by the tokens to be learned.
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
        report = _fit(model, rows, share, settings, device=device, progress=progress)
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
        DataError: Some do not; see `encode_rows`.
    """
    chat = Chat(encoder, template)

    def encode(example: Content) -> Encoded:
        match example:
            case Conversation():
                return chat.encode(example, max_tokens=max_tokens)
            case str():
                return encoder.encode_whole(example, max_tokens=max_tokens, reserve=1)
            case _:
                return encoder.encode(example.prompt, example.completion, max_tokens=max_tokens, reserve=1)

    return encode_rows(examples, encode, max_tokens=max_tokens)


def _fit(
    model: PeftModel,
    rows: Sequence[Encoded],
    share: LossShare,
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
    vocabulary = model.config.get_text_config().vocab_size

    def shares(batch: Sequence[Encoded]) -> Iterator[torch.Tensor]:
        n_counted = sum(row.n_counted for row in batch)
        parts = together([len(row.completion) for row in batch], vocabulary)
        return (share(model, batch[part], n_counted) for part in parts)

    losses = descend(model, batches, shares, settings, label="train", progress=progress)
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
