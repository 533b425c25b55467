"""Factors that are appended to a patch: dense algebra is the oracle, and PEFT's reading of the configuration."""

import torch
from peft import LoraConfig

from portllm.methods.ranks import Factors, add_to_b, with_appended
from portllm.methods.values import computed, whole
from portllm.patch.adapter_config import AdapterConfig
from portllm.patch.delta import LowRankDelta
from portllm.patch.patch import Patch

CLOSE = 1e-5
"""Of float32 matrices with entries of size 1, multiplied at rank 4."""


def some(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def delta(rank, d_out, d_in, *, seed, scale):
    a, b = some(rank, d_in, seed=seed), some(d_out, rank, seed=seed + 1)
    return LowRankDelta(computed("a", a), computed("b", b), scale=scale)


def dense(delta):
    return delta.scale * whole(delta.b).double() @ whole(delta.a).double()


FIELDS = {"r": 2, "lora_alpha": 3, "rank_pattern": {"down_proj": 3}, "use_rslora": True, "layers_to_transform": [0]}
PATCH = Patch(
    "patch",
    {"h.0.down_proj": delta(3, 6, 9, seed=0, scale=1.5), "h.0.q_proj": delta(2, 5, 6, seed=4, scale=0.5)},
    AdapterConfig({**FIELDS, "target_modules": ["down_proj", "q_proj"], "peft_type": "LORA"}),
    record=None,
)


def test_appended_factors_are_added_and_all_else_stays_as_it_is():
    more = {
        "h.0.down_proj": Factors(some(1, 9, seed=8), some(6, 1, seed=9)),
        "h.0.o_proj": Factors(some(2, 7, seed=10), some(6, 2, seed=11)),
    }
    made = with_appended(PATCH, more)
    for module in ("h.0.down_proj", "h.0.q_proj", "h.0.o_proj"):
        before = dense(PATCH.deltas[module]) if module in PATCH.deltas else 0
        added = more[module].b.double() @ more[module].a.double() if module in more else 0
        assert (dense(made.deltas[module]) - before - added).abs().max() < CLOSE
    assert {delta.rank for delta in made.deltas.values()} == {4}


def test_the_configuration_says_the_rank_and_the_scale_that_the_factors_have():
    fields = with_appended(PATCH, {"h.0.q_proj": Factors(some(1, 6, seed=8), some(5, 1, seed=9))}).config.fields
    read = LoraConfig(**{name: value for name, value in fields.items() if name != "peft_type"})
    assert (read.r, read.lora_alpha, read.use_rslora, read.rank_pattern) == (3, 3, False, {})
    assert read.target_modules == {"h.0.down_proj", "h.0.q_proj"}
    assert read.layers_to_transform is None


def test_a_change_of_b_is_the_change_of_what_the_module_adds():
    before, change = PATCH.deltas["h.0.down_proj"], some(6, 3, seed=12)
    after = add_to_b(before, change)
    assert (dense(after) - dense(before) - change.double() @ whole(before.a).double()).abs().max() < CLOSE
    assert after.a is before.a
