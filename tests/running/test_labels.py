import pytest

from portllm.running.labels import are_near, doubtful_labels


@pytest.mark.parametrize(
    ("one", "other"),
    [("refnd", "refund"), ("refudn", "refund"), ("Refund", "refund"), ("re fund", "refund"), ("refunds", "refund")],
)
def test_a_slip_of_the_pen_is_near(one, other):
    assert are_near(one, other)
    assert are_near(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [("label_1", "label_2"), ("yes", "yet"), ("positive", "negative"), ("entailment", "not_entailment"), ("a", "a")],
)
def test_labels_that_are_meant_to_differ_are_not_near(one, other):
    assert not are_near(one, other)


def test_two_common_labels_are_not_taken_for_each_other():
    assert list(doubtful_labels({"male": 20, "mole": 15})) == []


def test_answers_that_are_texts_are_not_questioned():
    assert list(doubtful_labels({"one answer": 1, "another": 1, "a third": 2})) == []
