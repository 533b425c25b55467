"""Plain text as blocks of token ids, for what goes on reading: texts one after another, cut into equal parts."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch.nn.functional import cross_entropy

from portllm.errors import DataError
from portllm.running.encoding import Encoder, together
from portllm.running.model import PeftModel, PreTrainedModel

Block: TypeAlias = tuple[int, ...]


@runtime_checkable
class Reading(Protocol):
    """How much is read at a time, and in which order."""

    @property
    def batch_size(self) -> int:
        """Blocks of an update."""

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""

    @property
    def seed(self) -> int:
        """Of the order of the texts."""


def encode_texts(encoder: Encoder, texts: Sequence[str], *, block_tokens: int) -> list[Block]:
    """Each text as ids, with an end mark.

    Raises:
        DataError: All together do not fill one block.
    """
    encoded = [(*encoder.encode_text(text), encoder.eos) for text in texts]
    n_tokens = sum(map(len, encoded))
    if n_tokens < block_tokens:
        raise DataError(
            f"{len(texts)} texts with {n_tokens} tokens do not fill one block of {block_tokens}. Provide more "
            "text, or use a smaller 'block_tokens'."
        )
    return encoded


def batches_of_blocks(texts: Sequence[Block], how: Reading) -> Iterator[list[Block]]:
    """Batches without end: the texts in one seeded order after another."""
    blocks = stream_blocks(texts, how)
    while True:
        yield list(itertools.islice(blocks, how.batch_size))


def stream_blocks(texts: Sequence[Block], how: Reading) -> Iterator[Block]:
    """Full blocks of the texts in one seeded order after another; no token is left out between two of them."""
    rest: Block = ()
    for epoch in itertools.count():
        order = list(range(len(texts)))
        random.Random(f"{how.seed}/{epoch}").shuffle(order)
        for index in order:
            rest += texts[index]
            while len(rest) >= how.block_tokens:
                yield rest[: how.block_tokens]
                rest = rest[how.block_tokens :]


def next_token_nats(
    model: PreTrainedModel | PeftModel, blocks: Sequence[Block], *, device: torch.device
) -> torch.Tensor:
    """The mean of `-log p(token | those before it in its block)` over all tokens but the first of each block."""
    ids = torch.tensor(blocks, device=device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def shares_of_nats(
    model: PreTrainedModel | PeftModel, blocks: Sequence[Block], *, device: torch.device
) -> Iterator[torch.Tensor]:
    """What `next_token_nats` gives, in summands, of as many blocks as have logits that fit into memory."""
    vocabulary = model.config.get_text_config().vocab_size
    for part in together([len(block) for block in blocks], vocabulary):
        some = blocks[part]
        yield next_token_nats(model, some, device=device) * (len(some) / len(blocks))
