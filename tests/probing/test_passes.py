"""Where models are asked: behind what all old specialists begin every answer with."""

import pytest
import torch

from portllm.probing.passes import MOST_SHARED, shared_beginning

END, BLANK, YES, NO = range(4)


def begin(*models):
    """The shared beginning of models of which each prompt's answer is given, and the tokens that they say after it."""

    def ask(shared):
        return [
            torch.nn.functional.one_hot(torch.tensor([answer[len(shared)] for answer in answers]), 4).float()
            for answers in models
        ]

    shared, logits = shared_beginning(ask, end=END)
    return shared, [each.argmax(dim=-1).tolist() for each in logits]


@pytest.mark.parametrize("count", [1, 2, MOST_SHARED])
def test_models_are_asked_behind_what_all_answers_begin_with(count):
    blanks = (BLANK,) * count
    assert begin([(*blanks, YES), (*blanks, NO), (*blanks, YES)]) == (blanks, [[YES, NO, YES]])


def test_answers_that_differ_at_once_have_no_beginning():
    assert begin([(BLANK, YES), (BLANK, NO), (YES, END)]) == ((), [[BLANK, BLANK, YES]])


def test_the_answers_of_every_model_have_to_begin_alike():
    assert begin([(BLANK, YES), (BLANK, NO)], [(YES, END), (YES, END)]) == ((), [[BLANK, BLANK], [YES, YES]])


@pytest.mark.parametrize("answer", [(YES, NO, END), (YES,) * (MOST_SHARED + 1)])
def test_one_answer_for_all_is_no_beginning_of_others(answer):
    assert begin([answer, answer]) == ((), [[YES, YES]])
