import pytest
import torch

from portllm.running.encoding import Encoded
from portllm.running.loss import completion_nats
from portllm.running.model import load_model

CPU = torch.device("cpu")

F32_LOSS_TOLERANCE = 1e-4  # nats: sums of some dozen float32 products in another order

ROWS = [
    Encoded(prompt=(5, 6, 7, 8, 9), completion=(10,)),
    Encoded(prompt=(5,), completion=(11, 12, 13)),
    Encoded(prompt=(20, 21, 22), completion=(14, 15)),
]


@pytest.fixture(scope="module")
def model(reader):
    return load_model(reader, device=CPU, dtype=torch.float32)


def nats_one_by_one(model, row):
    """The obvious way: the whole row alone, without padding, in float64 after the model."""
    ids = torch.tensor([row.prompt + row.completion])
    log_probs = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
    first = len(row.prompt)
    return [-float(log_probs[first + index - 1, token]) for index, token in enumerate(row.completion)]


@torch.no_grad()
def test_the_loss_of_each_token_is_that_of_the_row_alone(model):
    nats = completion_nats(model, ROWS, device=CPU)
    assert nats.shape == (3, 3)
    for index, row in enumerate(ROWS):
        expected = nats_one_by_one(model, row)
        assert nats[index, 3 - len(expected) :].tolist() == pytest.approx(expected, abs=F32_LOSS_TOLERANCE)
        assert nats[index, : 3 - len(expected)].tolist() == [0.0] * (3 - len(expected))


def test_every_weight_but_the_unused_has_a_gradient(model):
    completion_nats(model, ROWS, device=CPU).sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in model.parameters())
    model.zero_grad()
