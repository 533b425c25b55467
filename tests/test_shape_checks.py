"""While tests run, every function of the package checks the types and shapes of what it is given."""

import pytest
import torch
from jaxtyping import TypeCheckError

from portllm.patch.merge import delta_rows


def test_factors_whose_ranks_differ_are_noticed():
    with pytest.raises(TypeCheckError, match="rank"):
        delta_rows(torch.zeros(4, 3), torch.zeros(2, 5), scale=1.0)


def test_an_argument_of_another_type_is_noticed():
    with pytest.raises(TypeCheckError, match="scale"):
        delta_rows(torch.zeros(4, 2), torch.zeros(2, 5), scale="1.0")


def test_a_whole_number_is_a_number():
    assert delta_rows(torch.ones(1, 1), torch.ones(1, 1), scale=2).item() == 2
