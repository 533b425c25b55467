import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st

from portllm.evaluating.metrics import accuracy, flips, mean_loss, paired_change, retention

ROWS = st.lists(st.booleans(), min_size=1, max_size=60)
LOSSES = st.lists(st.floats(0, 20), min_size=2, max_size=60)

ROUNDING = 1e-9

FEW = 100  # resamples, where a law holds for each of them


@given(ROWS, st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_of_a_share_is_scipys_wilson_interval(correct, confidence):
    expected = scipy.stats.binomtest(sum(correct), len(correct)).proportion_ci(confidence, method="wilson")
    estimate = accuracy(correct, confidence=confidence)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=ROUNDING)


@given(ROWS)
def test_the_interval_of_a_share_holds_it_and_stays_between_zero_and_one(correct):
    estimate = accuracy(correct)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.high > estimate.low


@given(ROWS)
def test_right_and_wrong_are_mirror_images(correct):
    share, mirrored = accuracy(correct), accuracy([not row for row in correct])
    assert (share.value, share.low) == pytest.approx((1 - mirrored.value, 1 - mirrored.high), abs=ROUNDING)


def test_half_of_four_by_hand():
    # z = 1.96, z² = 3.8416: center 0.5, half width z √(1/16 + z²/64) / (1 + z²/4) = 1.96 * √0.1225 / 1.9604 = 0.34995.
    estimate = accuracy([True, True, False, False])
    assert (estimate.low, estimate.high) == pytest.approx((0.15004, 0.84996), abs=5e-5)


def test_a_mean_loss_by_hand():
    # Mean 2, standard deviation 1, standard error 1/√3.
    estimate = mean_loss([1.0, 2.0, 3.0])
    assert estimate.value == 2.0
    assert (estimate.low, estimate.high) == pytest.approx((2 - 1.95996 / 3**0.5, 2 + 1.95996 / 3**0.5), abs=1e-4)


@given(LOSSES)
def test_the_interval_of_a_mean_is_scipys_normal_interval(losses):
    assume(np.std(losses) > 1e-6)
    low, high = scipy.stats.norm.interval(0.95, loc=np.mean(losses), scale=scipy.stats.sem(losses))
    estimate = mean_loss(losses)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=1e-6)


def test_one_loss_has_no_interval():
    estimate = mean_loss([3.0])
    assert (estimate.value, estimate.low, estimate.high, estimate.n_rows) == (3.0, None, None, 1)


def test_the_interval_of_a_change_is_close_to_the_normal_one_for_many_rows():
    generator = np.random.default_rng(0)
    before = generator.normal(size=400)
    after = before + generator.normal(0.3, 0.5, size=400)
    change = after - before
    low, high = scipy.stats.norm.interval(0.95, loc=change.mean(), scale=scipy.stats.sem(change))
    estimate = paired_change(after.tolist(), before.tolist())
    assert estimate.value == pytest.approx(change.mean())
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.01)


def test_pairing_takes_what_rows_have_in_common_out_of_the_interval():
    hard_and_easy = [float(row) for row in range(50)]
    estimate = paired_change([row + 1 for row in hard_and_easy], hard_and_easy)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1.0, 1.0, 1.0))


@given(LOSSES)
def test_a_model_against_itself_has_not_changed(losses):
    estimate = paired_change(losses, losses, resamples=FEW)
    assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)


def test_retention_by_hand():
    # Evolved 2 of 10, retrained 10 of 10, ported 8 of 10: six of eight rows are kept.
    evolved = [True] * 2 + [False] * 8
    kept = retention(evolved=evolved, ported=[True] * 8 + [False] * 2, retrained=[True] * 10)
    assert kept.value == pytest.approx(6 / 8)
    assert 0 < kept.low < kept.value < kept.high <= 1
    assert kept.reason == ""


def test_retention_of_losses_counts_what_falls():
    kept = retention(
        evolved=[4.0, 6.0, 5.0, 5.0], ported=[2.0, 3.0, 3.0, 2.0], retrained=[1.0, 1.0, 1.0, 1.0], lower_is_better=True
    )
    assert kept.value == pytest.approx(2.5 / 4)


@given(st.lists(st.tuples(st.floats(3, 6), st.floats(0, 2)), min_size=3, max_size=40))
def test_what_retraining_gives_is_all_and_what_the_evolved_model_gives_is_nothing(rows):
    evolved, retrained = [row[0] for row in rows], [row[1] for row in rows]
    everything = retention(evolved=evolved, ported=retrained, retrained=retrained, lower_is_better=True, resamples=FEW)
    nothing = retention(evolved=evolved, ported=evolved, retrained=retrained, lower_is_better=True, resamples=FEW)
    assert (everything.value, everything.low, everything.high) == pytest.approx((1.0, 1.0, 1.0))
    assert (nothing.value, nothing.low, nothing.high) == (0.0, 0.0, 0.0)


@given(
    st.lists(st.tuples(st.floats(4, 6), st.floats(0, 6), st.floats(0, 2)), min_size=3, max_size=30),
    st.floats(0.1, 10),
    st.floats(-5, 5),
)
def test_retention_does_not_depend_on_the_unit_of_the_loss_or_where_it_starts(rows, unit, start):
    columns = [list(column) for column in zip(*rows, strict=True)]
    moved = [[unit * value + start for value in column] for column in columns]
    names = ("evolved", "ported", "retrained")
    plain = retention(**dict(zip(names, columns, strict=True)), lower_is_better=True, resamples=FEW)
    other = retention(**dict(zip(names, moved, strict=True)), lower_is_better=True, resamples=FEW)
    assert (other.value, other.low, other.high) == pytest.approx((plain.value, plain.low, plain.high), abs=1e-6)


def test_retention_is_more_than_all_where_the_ported_patch_does_better_and_less_than_nothing_where_it_harms():
    def kept(ported):
        return retention(evolved=[5.0] * 8, ported=[ported] * 8, retrained=[3.0] * 8, lower_is_better=True).value

    assert kept(2.0) == pytest.approx(1.5)
    assert kept(6.0) == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("evolved", "retrained"),
    [
        ([True, False] * 10, [True, False] * 10),
        ([True, False] * 10, [False, True] * 10),
        ([True] * 10, [False] * 10),
        ([False] * 20, [False] * 19 + [True]),
    ],
    ids=["no gain", "as many lost as gained", "a loss", "one row of twenty"],
)
def test_where_retraining_gains_nothing_that_can_be_told_retention_is_not_a_number(evolved, retrained):
    kept = retention(evolved=evolved, ported=evolved, retrained=retrained)
    assert (kept.value, kept.low, kept.high) == (None, None, None)
    assert "indistinguishable from zero" in kept.reason


def test_the_reason_says_the_gain_and_its_interval():
    kept = retention(evolved=[1.0, 2.0], ported=[1.0, 2.0], retrained=[1.0, 2.0], lower_is_better=True)
    assert kept.reason.startswith("retraining gains 0.000 in loss over the evolved model, between 0.000 and 0.000")


@given(st.integers(0, 5), st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_the_interval_of_retention_is_finite_and_the_same_for_the_same_seed(seed, rows):
    evolved, ported, retrained = (list(column) for column in zip(*rows, strict=True))
    kept = retention(evolved=evolved, ported=ported, retrained=retrained, seed=seed, resamples=FEW)
    assert kept == retention(evolved=evolved, ported=ported, retrained=retrained, seed=seed, resamples=FEW)
    assert kept.value is None or (math.isfinite(kept.low) and math.isfinite(kept.high) and kept.low <= kept.high)


def test_the_seed_changes_the_interval_and_not_the_value():
    generator = np.random.default_rng(1)
    rows = {
        "evolved": (5 + generator.random(30)).tolist(),
        "ported": (2 + generator.random(30)).tolist(),
        "retrained": (1 + generator.random(30)).tolist(),
    }
    one, other = (retention(**rows, lower_is_better=True, seed=seed) for seed in (0, 1))
    assert one.value == other.value
    assert one.low != other.low


def test_rows_that_are_not_paired_are_a_bug():
    with pytest.raises(ValueError, match="not paired"):
        paired_change([1.0, 2.0], [1.0])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30))
def test_flips_are_the_difference_of_the_right_answers(rows):
    before, after = [row[0] for row in rows], [row[1] for row in rows]
    changed = flips(before, after)
    assert sum(after) - sum(before) == len(changed.positive) - len(changed.negative)
    assert all(before[row] and not after[row] for row in changed.negative)
    assert flips(after, before).negative == changed.positive


def test_everything_goes_into_json():
    values = (
        accuracy([True, False]),
        mean_loss([1.0]),
        retention(evolved=[False], ported=[True], retrained=[True]),
        flips([True], [False]),
    )
    assert json.loads(json.dumps([value.to_json() for value in values], allow_nan=False))[3]["negative_rows"] == [1]
