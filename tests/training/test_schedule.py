import pytest
from hypothesis import given
from hypothesis import strategies as st

from portllm.training.schedule import bucketed_batches, learning_rate_share


def shares(steps, **how):
    return [learning_rate_share(step, steps=steps, **how) for step in range(steps)]


def test_the_rate_rises_to_its_peak_and_falls_in_a_straight_line():
    assert shares(6, warmup=0.3, decay="linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_the_cosine_is_half_way_down_in_the_middle():
    assert shares(4, warmup=0.0, decay="cosine") == pytest.approx([1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])


def test_without_decay_the_rate_stays_at_its_peak():
    assert shares(4, warmup=0.25, decay="constant") == [1.0] * 4


@given(st.integers(1, 200), st.floats(0, 0.99), st.sampled_from(["cosine", "linear", "constant"]))
def test_every_step_has_a_rate_above_zero_and_some_step_has_the_peak(steps, warmup, decay):
    rates = shares(steps, warmup=warmup, decay=decay)
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1.0


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_has_every_row_once_in_batches_of_the_size_asked_for(lengths, batch_size, epoch):
    batches = bucketed_batches(lengths, batch_size=batch_size, seed=0, epoch=epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert all(len(batch) <= batch_size for batch in batches)


def test_rows_of_similar_length_meet():
    lengths = [(7 * row) % 64 for row in range(64)]
    batches = bucketed_batches(lengths, batch_size=4, seed=0, epoch=0)
    assert all(max(lengths[row] for row in batch) - min(lengths[row] for row in batch) == 3 for batch in batches)


def test_the_order_is_that_of_seed_and_epoch():
    def order(seed, epoch):
        return bucketed_batches(list(range(40)), batch_size=4, seed=seed, epoch=epoch)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
