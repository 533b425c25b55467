"""Text is cut into blocks without a gap, and the loss on a block is the mean over the tokens it predicts."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import log_softmax

from portllm.running.encoding import Encoder
from portllm.running.model import load_model, load_tokenizer
from portllm.running.text_blocks import encode_texts, next_token_nats, stream_blocks
from portllm.running.text_loss import measure_text_loss
from portllm.training.evolve import EvolveSettings
from tests.language import TEXT

TEXTS = TEXT.strip().splitlines()


def test_blocks_are_the_texts_one_after_another_without_a_gap():
    texts = [(1, 2, 3), (4,), (5, 6, 7, 8, 9)]
    settings = EvolveSettings(block_tokens=4, seed=5)
    blocks = list(itertools.islice(stream_blocks(texts, settings), 9))
    assert {len(block) for block in blocks} == {4}
    stream = list(itertools.chain.from_iterable(blocks))
    for start in range(0, 36, 9):
        assert sorted(stream[start : start + 9]) == list(range(1, 10))
    assert stream[:9] != stream[9:18] or stream[:9] != stream[18:27]


def test_the_loss_is_the_mean_over_full_blocks_in_order(reader):
    loss = measure_text_loss(reader, TEXTS, block_tokens=16, device="cpu")
    encoded = encode_texts(Encoder(load_tokenizer(reader)), TEXTS, block_tokens=16)
    ids = list(itertools.chain.from_iterable(encoded))
    model = load_model(reader, device=torch.device("cpu"))
    nats = []
    for start in range(0, len(ids) - 15, 16):
        block = torch.tensor([ids[start : start + 16]])
        with torch.inference_mode():
            likely = log_softmax(model(input_ids=block).logits[0, :-1].double(), dim=-1)
        nats += [-likely[place, block[0, place + 1]].item() for place in range(15)]
    assert loss.n_tokens == len(nats)
    assert loss.nats == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert loss.perplexity == pytest.approx(math.exp(loss.nats))


def test_blocks_of_a_batch_count_alike(reader):
    model = load_model(reader, device=torch.device("cpu"))
    blocks = [tuple(range(20, 28)), tuple(range(40, 48))]
    with torch.inference_mode():
        single = [next_token_nats(model, [block], device=torch.device("cpu")).item() for block in blocks]
        both = next_token_nats(model, blocks, device=torch.device("cpu")).item()
    assert both == pytest.approx(sum(single) / 2, rel=1e-5)
