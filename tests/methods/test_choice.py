"""Which candidate is taken, by what was counted prompt by prompt."""

import torch

from portllm.methods.choice import choose, distance

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
