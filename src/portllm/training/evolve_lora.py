"""A later version of a base by LoRA: factors of a high rank are trained on plain text, to be merged into the weights.

The paper's evolved models were made in this way. What it changes has a rank of its own, so a patch that is added to it
is more nearly apart from it than from full-weight training.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from portllm.files.output_folder import staged_folder
from portllm.progress import Progress, silent
from portllm.running.encoding import Encoder
from portllm.running.model import Device, add_fresh_lora, choose_device, load_model, load_tokenizer, save_adapter
from portllm.running.ranges import require_ranges
from portllm.running.text_blocks import batches_of_blocks, encode_texts, shares_of_nats
from portllm.training.descent import descend
from portllm.training.evolve import EvolveSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraEvolveSettings(EvolveSettings):
    """As `EvolveSettings`, and of the factors.

    Attributes:
        rank: Inner size of the factors.
        alpha: PEFT's numerator: the scale is `alpha / rank`.
        target_modules: Names of the linear modules; `all-linear` is all but the head.
    """

    rank: int = 64
    alpha: int = 128
    target_modules: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        EvolveSettings.__post_init__(self)
        require_ranges(
            "evolution settings",
            ("rank", self.rank, "1 or more", self.rank >= 1),
            ("alpha", self.alpha, "1 or more", self.alpha >= 1),
        )


def train_on_text(
    base_folder: str | Path,
    texts: Sequence[str],
    settings: LoraEvolveSettings,
    adapter_folder: str | Path,
    *,
    device: Device = "auto",
    progress: Progress = silent,
) -> tuple[float, ...]:
    """Trains a LoRA adapter of a base on texts and writes it as a PEFT folder.

    The loss of a step is the mean of `-log p(token | those before it in its block)`. On a CPU, the same base, texts and
    settings give the same bytes.

    Args:
        base_folder: Checkpoint folder of the base.
        texts: What it goes on reading.
        settings: Everything else.
        adapter_folder: The folder to be; a failed run leaves nothing there.
        device: Where to train.
        progress: Progress callback (steps).

    Returns:
        The loss of each step, in nats per token.

    Raises:
        CheckpointError: The base cannot be loaded.
        AdapterFormatError: The target modules are not in the base.
        DataError: The texts have fewer tokens than one block.
        OutputError: The adapter cannot be written; `OutputExistsError` if something is there.
        PortLLMError: The loss is not finite.
    """
    with staged_folder(Path(adapter_folder), overwrite=False) as staging:
        where = choose_device(device)
        encoded = encode_texts(Encoder(load_tokenizer(base_folder)), texts, block_tokens=settings.block_tokens)
        batches = list(itertools.islice(batches_of_blocks(encoded, settings), settings.steps))
        # As in training a patch: LoRA's factors draw from torch's global generator, whose state is put back.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(settings.seed)
            model = add_fresh_lora(
                load_model(base_folder, device=where, longest=settings.block_tokens),
                rank=settings.rank,
                alpha=settings.alpha,
                target_modules=settings.target_modules,
                use_rslora=False,
                dropout=0.0,
            )
            losses = descend(
                model,
                batches,
                lambda blocks: shares_of_nats(model, blocks, device=where),
                settings,
                label="evolve",
                progress=progress,
            )
        save_adapter(model, staging)
    return losses
