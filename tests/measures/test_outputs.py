"""What models say, compared: against SciPy's entropies, and by the laws of divergences."""

import math

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from portllm.measures.outputs import Distance, effect_kept, measure_distance, measure_shift

EXACT = 1e-9


def drawn(seed, *, prompts=5, vocabulary=31, size=2.0):
    return size * np.random.default_rng(seed).standard_normal((prompts, vocabulary)).astype(np.float32)


def test_the_distance_is_the_relative_entropy_of_the_distributions():
    one, other = drawn(0), drawn(1)
    found = measure_distance(one, other)
    p, q = (softmax(logits.astype(np.float64), axis=1) for logits in (one, other))
    assert found.nats == pytest.approx(entropy(p, q, axis=1), rel=EXACT)
    assert found.mean == pytest.approx(entropy(p, q, axis=1).mean(), rel=EXACT)
    assert found.agreement == (one.argmax(axis=1) == other.argmax(axis=1)).mean()


def test_a_model_is_no_distance_from_itself_and_a_constant_in_the_logits_says_nothing():
    one = drawn(0)
    assert measure_distance(one, one) == Distance((0.0,) * 5, 1.0)
    assert measure_distance(one, one + np.float32(4)).mean == pytest.approx(0.0, abs=1e-9)


def test_the_effect_is_kept_whole_by_the_specialist_and_not_at_all_by_the_evolved_model():
    specialist, evolved = drawn(0), drawn(1)
    without = measure_distance(specialist, evolved)
    assert effect_kept(measure_distance(specialist, specialist), without).value == 1.0
    assert effect_kept(without, without).value == 0.0
    assert effect_kept(without, measure_distance(specialist, specialist)) is None


def test_a_port_that_leads_away_keeps_less_than_nothing():
    assert effect_kept(Distance((3.0, 2.0), 0.0), Distance((1.0, 1.0), 0.0)).value == -1.5


def test_the_error_of_the_effect_is_what_samples_of_prompts_vary_by():
    generator = np.random.default_rng(0)
    evolved = generator.exponential(size=(4000, 60))
    ported = evolved * generator.uniform(0.1, 0.5, size=evolved.shape)
    found = [
        effect_kept(Distance(tuple(one), 0.0), Distance(tuple(other), 0.0))
        for one, other in zip(ported, evolved, strict=True)
    ]
    spread = np.std([kept.value for kept in found])
    # 4000 samples give the spread to 1 %; the delta method is off by terms of order 1/60.
    assert np.mean([kept.error for kept in found]) == pytest.approx(spread, rel=0.06)
    assert math.isinf(effect_kept(Distance((0.1,), 1.0), Distance((1.0,), 1.0)).error)


def test_the_shift_is_a_weighted_cosine_of_log_ratios():
    base, specialist, evolved, ported = (drawn(seed) for seed in range(4))
    p = [softmax(logits.astype(np.float64), axis=1) for logits in (base, specialist, evolved, ported)]
    weights = (p[0] + p[1]) / 2
    old, new = np.log(p[1] / p[0]), np.log(p[3] / p[2])
    old, new = (moved - (weights * moved).sum(axis=1, keepdims=True) for moved in (old, new))
    found = measure_shift(base, specialist, evolved, ported)
    norms = np.sqrt([(weights * old * old).sum(), (weights * new * new).sum()])
    assert found.cosine == pytest.approx((weights * old * new).sum() / norms.prod(), rel=EXACT)
    assert found.ratio == pytest.approx(norms[1] / norms[0], rel=EXACT)


def test_what_the_update_does_to_both_models_is_no_part_of_the_shift():
    base, specialist, update = drawn(0), drawn(1), drawn(2)
    found = measure_shift(base, specialist, base + update, specialist + update)
    assert (found.cosine, found.ratio) == pytest.approx((1.0, 1.0), abs=1e-6)  # float32 sums of logits
    assert measure_distance(specialist, specialist + update).mean > 0.1


def test_a_patch_that_does_nothing_has_no_shift():
    base, evolved = drawn(0), drawn(1)
    assert measure_shift(base, base, evolved, drawn(2)) is None
    assert measure_shift(base, drawn(2), evolved, evolved) is None
