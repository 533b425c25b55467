"""Which candidate is taken, by what was counted prompt by prompt."""

import numpy as np
import pytest
import torch

from portllm.methods.choice import choose, clustered, distance, wilson

LIKE = torch.full((16,), 0.01, dtype=torch.float64)


def with_some(values):
    """Small divergences, and a few others."""
    rows = LIKE.clone()
    rows[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return rows


def test_a_few_prompts_that_are_far_off_do_not_hide_what_is_better_on_all_others():
    simple, better = torch.full((16,), 0.06, dtype=torch.float64), with_some([0.8, 0.1])
    assert simple.mean() < better.mean(), "by the mean divergence the simple one is best"
    assert choose({"simple": distance(simple), "better": distance(better)}) == "better"


def test_a_distance_bounds_the_total_variation():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 200, 5, generator=generator, dtype=torch.float64).mul(2).softmax(dim=2)
    nats = (one * (one.log() - other.log())).sum(dim=1)
    assert (distance(nats) >= (one - other).abs().sum(dim=1) / 2).all()


def test_rounding_below_zero_is_no_distance():
    assert distance(torch.tensor([-1e-17], dtype=torch.float64)).tolist() == [0.0]


@pytest.mark.parametrize("tokens", [40, 40 * 24])
def test_where_prompts_are_alike_throughout_or_not_at_all_each_is_one_draw(tokens):
    shares = torch.tensor([1.0] * 36 + [0.0] * 4, dtype=torch.float64)
    assert clustered(shares, tokens) == pytest.approx(wilson(36, 40))
    assert clustered(torch.ones(40, dtype=torch.float64), tokens) == pytest.approx(wilson(40, 40))


def test_no_more_is_drawn_than_there_are_tokens():
    shares = torch.tensor([0.9, 0.9, 0.9, 0.8] * 10, dtype=torch.float64)  # less apart than tokens drawn by themselves
    assert clustered(shares, 400) == pytest.approx(wilson(0.875 * 400, 400))


@pytest.mark.parametrize(("mean", "alike"), [(0.95, 10.0), (0.85, 10.0), (0.85, 200.0)])
def test_the_interval_has_the_mean_as_often_as_it_says(mean, alike):
    """Of 64 prompts with 24 tokens, drawn from a beta distribution that is narrower the more they are alike."""
    draw, tokens = np.random.default_rng(0), 24
    there = 0
    for _ in range(1000):
        of_prompt = draw.beta(mean * alike, (1 - mean) * alike, 64)
        low, high = clustered(torch.from_numpy(draw.binomial(tokens, of_prompt) / tokens), 64 * tokens)
        there += low <= mean <= high
    assert 0.93 <= there / 1000 <= 0.98
