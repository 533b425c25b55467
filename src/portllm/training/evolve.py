"""A later version of a base: full-weight continued pretraining on plain text.

What a provider does to a model between two releases, in small. Weights are stored in sixteen bits but trained through
float32 masters: one AdamW step moves most weights by less than half a unit in the last place of a bfloat16.
"""

import itertools
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from portllm.checkpoint.model.side_files import side_files
from portllm.errors import PortLLMError
from portllm.files.output_folder import staged_folder
from portllm.progress import Progress, silent
from portllm.running.encoding import Encoder
from portllm.running.model import Device, PreTrainedModel, choose_device, load_model, load_tokenizer, save_model
from portllm.running.ranges import require_ranges
from portllm.running.text_blocks import Block, batches_of_blocks, encode_texts, shares_of_nats
from portllm.training.descent import backpropagated
from portllm.training.schedule import Decay, learning_rate_share


@dataclass(frozen=True, slots=True, kw_only=True)
class EvolveSettings:
    """Everything that an evolution depends on but its base and its texts.

    Attributes:
        learning_rate: At its peak.
        steps: Updates; the texts are gone through again, in another order, as often as that takes.
        batch_size: Blocks of an update.
        block_tokens: Tokens of a block; texts are packed into blocks one after another, an end mark between them.
        warmup: Share of the steps on which the learning rate rises.
        decay: How it falls afterwards.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are scaled down to this norm.
        seed: Of the order of the texts.

    Raises:
        PortLLMError: A value is out of its range; all of them are named.
    """

    learning_rate: float = 1e-4
    steps: int = 50
    batch_size: int = 4
    block_tokens: int = 256
    warmup: float = 0.1
    decay: Decay = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_ranges(
            "evolution settings",
            ("learning_rate", self.learning_rate, "more than 0", 0 < self.learning_rate < math.inf),
            ("steps", self.steps, "1 or more", self.steps >= 1),
            ("batch_size", self.batch_size, "1 or more", self.batch_size >= 1),
            ("block_tokens", self.block_tokens, "2 or more", self.block_tokens >= 2),
            ("warmup", self.warmup, "0 to below 1", 0 <= self.warmup < 1),
            ("weight_decay", self.weight_decay, "0 or more", self.weight_decay >= 0),
            ("max_grad_norm", self.max_grad_norm, "more than 0", self.max_grad_norm > 0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvolveReport:
    """What an evolution did.

    Attributes:
        losses: Mean loss of each step, in nats per token.
        drift: `‖W1 - W0‖ / ‖W0‖` over all weights, as they are stored.
        seconds: Of the steps, loading and saving apart.
        n_trained: Numbers in the weights.
        n_tokens: Tokens that went through the model.
        steps: Updates.
        device: Where it ran.
        peak_bytes: Most memory torch held on a CUDA device; None on a CPU, where it is not counted.
    """

    losses: tuple[float, ...]
    drift: float
    seconds: float
    n_trained: int
    n_tokens: int
    steps: int
    device: str
    peak_bytes: int | None


def evolve(
    base_folder: str | Path,
    texts: Sequence[str],
    settings: EvolveSettings,
    out_folder: str | Path,
    *,
    device: Device = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
) -> EvolveReport:
    """Trains all weights of a base on texts and writes the evolved checkpoint, in the dtype of the base.

    Tokenizer and every other file beside the weights are those of the base. On a CPU, the same base, texts and settings
    give the same weights.

    Args:
        base_folder: Checkpoint folder of the base.
        texts: What it goes on reading.
        settings: Everything else.
        out_folder: The folder to be; a failed run leaves nothing there.
        device: Where to train.
        overwrite: Replace what is at `out_folder`.
        progress: Progress callback (steps).

    Raises:
        CheckpointError: The base cannot be loaded.
        DataError: The texts have fewer tokens than one block.
        OutputError: The checkpoint cannot be written; `OutputExistsError` if something is there.
        PortLLMError: The loss is not finite.
    """
    with staged_folder(Path(out_folder), overwrite=overwrite) as staging:
        where = choose_device(device)
        encoded = encode_texts(Encoder(load_tokenizer(base_folder)), texts, block_tokens=settings.block_tokens)
        model = load_model(base_folder, device=where, longest=settings.block_tokens)
        report = _fit(model, encoded, settings, device=where, progress=progress)
        save_model(model, staging)
        _copy_companions(Path(base_folder), staging)
    return report


def _fit(
    model: PreTrainedModel,
    texts: Sequence[Block],
    settings: EvolveSettings,
    *,
    device: torch.device,
    progress: Progress,
) -> EvolveReport:
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    start = [weight.detach().to("cpu", copy=True) for weight in weights]
    masters = [torch.nn.Parameter(weight.detach().float().clone()) for weight in weights]
    optimizer = torch.optim.AdamW(
        masters, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.95), fused=True
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model.train()
    losses: list[float] = []
    began = time.perf_counter()
    progress("evolve", 0, settings.steps, "steps")
    for step, blocks in enumerate(itertools.islice(batches_of_blocks(texts, settings), settings.steps)):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_share(
                step, steps=settings.steps, warmup=settings.warmup, decay=settings.decay
            )
        loss = backpropagated(shares_of_nats(model, blocks, device=device))
        if not math.isfinite(loss):
            raise PortLLMError(
                f"evolution: the loss is {loss} at step {step + 1} of {settings.steps}; nothing was "
                f"written. Lower the learning rate (now {settings.learning_rate:g})."
            )
        for master, weight in zip(masters, weights, strict=True):
            master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, settings.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
                master.grad = None
        losses.append(loss)
        progress(f"evolve: loss {losses[-1]:.3f}", step + 1, settings.steps, "steps")
    model.eval()
    return EvolveReport(
        losses=tuple(losses),
        drift=_drift(start, weights, stored=model.config.dtype),
        seconds=time.perf_counter() - began,
        n_trained=sum(weight.numel() for weight in weights),
        n_tokens=settings.steps * settings.batch_size * settings.block_tokens,
        steps=settings.steps,
        device=str(device),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _drift(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], *, stored: torch.dtype) -> float:
    moved = sum(
        float((new.detach().to(device="cpu", dtype=stored).double() - old.double()).square().sum())
        for old, new in zip(before, after, strict=True)
    )
    size = sum(float(old.double().square().sum()) for old in before)
    return math.sqrt(moved / size) if size else 0.0


def _copy_companions(base: Path, folder: Path) -> None:
    """Copies what stands beside the weights of the base and is not there yet: tokenizer, templates, license."""
    for file in side_files(base):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
