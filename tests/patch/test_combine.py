"""Deltas combined, against dense float64 arithmetic, a plain reference for TIES and DARE, and PEFT's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from portllm.patch.combine import concatenate, dare, drawn, rerank, select, ties, trim
from portllm.patch.delta import LowRankDelta


def delta_of(m, n, rank, *, scale=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator)
    return LowRankDelta(a=a.to(dtype), b=b.to(dtype), scale=scale)


def dense(delta):
    return delta.scale * delta.b.double() @ delta.a.double()


def dense_sum(deltas, weights):
    return sum(weight * dense(delta) for delta, weight in zip(deltas, weights, strict=True))


class Shapes(TorchFunctionMode):
    """The shapes of all tensors that torch makes while this is on."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple) else (made,):
            if isinstance(one, torch.Tensor):
                self.seen.add(tuple(one.shape))
        return made


@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    data=st.data(),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_side_by_side_factors_are_the_weighted_sum(ranks, shape, data):
    deltas = [delta_of(*shape, rank, scale=2.0 ** (seed - 1), seed=seed) for seed, rank in enumerate(ranks)]
    weights = data.draw(st.lists(st.floats(-2, 2), min_size=len(ranks), max_size=len(ranks)))
    combined = concatenate(deltas, weights=weights)
    assert combined.rank == sum(ranks)
    assert torch.allclose(dense(combined), dense_sum(deltas, weights), atol=1e-4)


def test_factors_of_powers_of_two_are_exact():
    deltas = [delta_of(6, 5, 2, scale=0.5), delta_of(6, 5, 3, scale=4.0, seed=1, dtype=torch.bfloat16)]
    combined = concatenate(deltas, weights=[1.0, -2.0])
    assert torch.equal(dense(combined), dense_sum(deltas, [1.0, -2.0]))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_smaller_rank_is_the_truncated_decomposition(rank):
    delta = delta_of(30, 20, 6, scale=-1.5)
    s = torch.linalg.svdvals(dense(delta))
    captured = rerank(delta, rank=rank)
    assert captured.rank == rank
    assert captured.truncation_residual == pytest.approx((s[rank:].norm() / s.norm()).item(), rel=1e-4)
    assert (dense(captured.delta) - dense(delta)).norm().item() == pytest.approx(s[rank:].norm().item(), rel=1e-4)


def test_no_tensor_of_the_weights_shape_is_made_where_a_rank_is_cut():
    deltas = [delta_of(70, 50, 4, seed=seed) for seed in range(3)]
    with Shapes() as shapes:
        rerank(concatenate(deltas, weights=[1.0, 1.0, 1.0]), rank=2)
    assert shapes.seen
    assert all(min(shape) <= 12 for shape in shapes.seen if len(shape) == 2)


def test_the_check_for_dense_shapes_notices_one():
    delta = delta_of(70, 50, 4)
    with Shapes() as shapes:
        _ = delta.b @ delta.a
    assert (70, 50) in shapes.seen


def test_what_two_deltas_share_is_stored_once():
    delta = delta_of(30, 20, 3)
    captured = rerank(concatenate([delta, delta], weights=[1.0, 0.5]))
    assert captured.rank == 3
    assert captured.truncation_residual < 1e-6
    assert torch.allclose(dense(captured.delta), 1.5 * dense(delta), atol=1e-5)


def test_a_sum_of_nothing_has_no_delta():
    delta = delta_of(30, 20, 3)
    assert rerank(concatenate([delta, delta], weights=[0.0, 0.0])).delta is None


def ties_by_element(deltas, weights, density):
    """TIES as one reads it, in float64: trim, elect, average those that agree."""
    trimmed = []
    for delta in deltas:
        flat = delta.double().numpy().reshape(-1).copy()
        dropped = np.argsort(-np.abs(flat), kind="stable")[int(density * flat.size) :]
        flat[dropped] = 0
        trimmed.append(flat)
    merged = np.zeros_like(trimmed[0])
    for place in range(merged.size):
        votes = [weight * flat[place] for weight, flat in zip(weights, trimmed, strict=True)]
        sign = np.sign(sum(votes))
        agreeing = [vote for vote in votes if sign != 0 and np.sign(vote) == sign]
        merged[place] = sum(agreeing) / len(agreeing) if agreeing else 0
    return merged.reshape(deltas[0].shape)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 0.5, -0.25]])
def test_ties_is_what_the_paper_says(density, weights):
    deltas = [torch.randn(7, 9, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = ties_by_element(deltas, weights, density)
    assert np.allclose(ties(deltas, weights=weights, density=density).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_ties_with_equal_weights_is_that_of_peft(density):
    from peft.utils.merge_utils import ties as ties_of_peft

    deltas = [torch.randn(7, 9, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = ties_of_peft(deltas, torch.ones(3), density)
    assert torch.allclose(ties(deltas, weights=[1.0, 1.0, 1.0], density=density), expected, atol=1e-6)


def test_trimming_keeps_the_largest_elements_and_leaves_its_input():
    delta = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    before = delta.clone()
    trimmed = trim(delta, density=0.25)
    assert (trimmed != 0).sum() == 10
    assert trimmed[trimmed != 0].abs().min() >= delta[trimmed == 0].abs().max()
    trim(delta, density=1.0).zero_()
    assert torch.equal(delta, before)


def test_dare_scales_up_what_it_keeps_and_is_right_on_average():
    deltas = [torch.full((200, 100), 3.0), torch.full((200, 100), -1.0)]
    combined = dare(deltas, weights=[1.0, 2.0], density=0.25, seed=1, name="q")
    assert {round(value, 4) for value in combined.unique().tolist()} == {0.0, 12.0, -8.0, 4.0}
    assert combined.mean().item() == pytest.approx(1.0, abs=0.2)


def test_dare_is_its_masks_times_the_deltas():
    deltas = [torch.randn(7, 9, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    expected = sum(
        weight * torch.where(drawn(delta, density=0.4, seed=3, name=f"q\0{number}"), delta.double(), 0.0) / 0.4
        for number, (delta, weight) in enumerate(zip(deltas, [1.0, -0.5], strict=True))
    )
    combined = dare(deltas, weights=[1.0, -0.5], density=0.4, seed=3, name="q")
    assert torch.allclose(combined.double(), expected, atol=1e-6)


def test_draws_follow_seed_and_name():
    shape = torch.zeros(40, 30)
    draws = [drawn(shape, density=0.5, seed=seed, name=name) for seed, name in ((0, "q"), (0, "q"), (1, "q"), (0, "k"))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])
    assert draws[0].float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_what_is_selected_is_cut_to_its_rank_and_says_what_that_costs(method):
    deltas = [delta_of(30, 20, 3, scale=2.0, seed=seed) for seed in range(2)]
    dense_deltas = [dense(delta).float() for delta in deltas]
    if method == "ties":
        whole = ties(dense_deltas, weights=[1.0, 0.5], density=0.6)
    else:
        whole = dare(dense_deltas, weights=[1.0, 0.5], density=0.6, seed=4, name="q")
    captured = select(deltas, weights=[1.0, 0.5], method=method, density=0.6, rank=4, seed=4, name="q")
    s = torch.linalg.svdvals(whole.double())
    assert captured.rank == 4
    assert captured.truncation_residual == pytest.approx((s[4:].norm() / s.norm()).item(), rel=1e-3)
