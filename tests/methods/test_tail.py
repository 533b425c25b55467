"""Corrections at the last writer: dense algebra is the oracle."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.methods.tail import Regression, balance, balance_move, logit_moves

CLOSE = 1e-8


def some(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.sampled_from([4, 30]), rank=st.integers(1, 3))
def test_reduced_rank_ridge_is_the_whole_map_projected_on_its_leading_directions(seed, n, rank):
    u, move = some(n, 9, seed=seed), some(n, 5, seed=seed + 1)
    weight = some(n, seed=seed + 2).abs()
    plain_u, plain_move, root = u, move, weight.sqrt()[:, None]
    u, move = root * u, root * move
    penalty = 0.1 * u.pow(2).sum() / weight.sum()
    inverse = torch.linalg.inv(u.T @ u + penalty * torch.eye(9, dtype=torch.float64))
    whole = move.T @ u @ inverse
    leading = torch.linalg.eigh(whole @ (u.T @ u + penalty * torch.eye(9, dtype=torch.float64)) @ whole.T).eigenvectors
    kept = leading[:, -rank:]
    found = Regression.on(plain_u, weight, rho=0.1).fit(plain_move, rank=rank)
    assert (found.b @ found.a - kept @ kept.T @ whole).abs().max() < CLOSE
    assert len(found.a) == found.b.shape[1] == rank


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_states_moved_for_logits_have_these_up_to_what_a_softmax_does_not_see(seed):
    head, gain, states = some(4, 12, seed=seed), some(12, seed=seed + 1).abs() + 0.1, some(6, 12, seed=seed + 2)
    difference = some(6, 4, seed=seed + 3)
    moves = logit_moves(difference, head, gain, states)
    rms = states.pow(2).mean(dim=1, keepdim=True).sqrt()
    change = (moves / rms) @ (gain * head).T - difference
    assert (change - change.mean(dim=1, keepdim=True)).abs().max() < CLOSE


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_balanced_logits_have_the_mean_shares_that_are_wanted(seed):
    wanted, logits = some(30, 4, seed=seed).softmax(dim=1), some(30, 4, seed=seed + 1)
    bias = balance(wanted, logits)
    shares = (logits + bias).softmax(dim=1).mean(dim=0)
    assert (shares - wanted.mean(dim=0)).abs().max() < 1e-6
    head, gain = some(4, 12, seed=seed + 2), some(12, seed=seed + 3).abs() + 0.1
    change = (gain * head) @ balance_move(bias, head, gain) - bias
    assert (change - change.mean()).abs().max() < CLOSE
