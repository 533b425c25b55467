"""What a model pays for plain text: the loss whose exponential is the perplexity."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from portllm.progress import Progress, silent
from portllm.running.encoding import Encoder
from portllm.running.model import Device, choose_device, load_model, load_tokenizer
from portllm.running.text_blocks import encode_texts, shares_of_nats

BATCH = 4


@dataclass(frozen=True, slots=True)
class TextLoss:
    """The loss of a model on a text.

    Attributes:
        nats: Mean of `-log p(token | those before it in its block)`.
        n_tokens: Tokens that it is the mean over.
    """

    nats: float
    n_tokens: int

    @property
    def perplexity(self) -> float:
        """`exp(nats)`.

        Example:
            >>> TextLoss(0.0, 10).perplexity
            1.0
        """
        return math.exp(self.nats)


def measure_text_loss(
    folder: str | Path,
    texts: Sequence[str],
    *,
    block_tokens: int,
    device: Device = "auto",
    progress: Progress = silent,
) -> TextLoss:
    """The loss of a model on texts, in their order, an end mark after each, in full blocks.

    The tokens after the last full block are left out, so that every token but the first of a block counts alike.

    Args:
        folder: Checkpoint folder.
        texts: What it reads.
        block_tokens: Tokens that it is given at a time.
        device: Device to run on.
        progress: Progress callback (blocks).

    Raises:
        CheckpointError: The model cannot be loaded.
        DataError: The texts do not fill one block.
    """
    where = choose_device(device)
    encoded = encode_texts(Encoder(load_tokenizer(folder)), texts, block_tokens=block_tokens)
    ids = tuple(itertools.chain.from_iterable(encoded))
    blocks = [ids[start : start + block_tokens] for start in range(0, len(ids) - block_tokens + 1, block_tokens)]
    model = load_model(folder, device=where, longest=block_tokens)
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(blocks), BATCH):
            batch = blocks[start : start + BATCH]
            shares = shares_of_nats(model, batch, device=where)
            total += sum(share.item() for share in shares) * len(batch)
            progress("read", start + len(batch), len(blocks), "steps")
    return TextLoss(total / len(blocks), len(blocks) * (block_tokens - 1))
