import pytest

import portllm
from portllm.errors import PortLLMError

PLACES = {"base": "base", "out": "out"}


@pytest.mark.parametrize("given", [{}, {"adapter": "adapter", "tuned": "tuned"}], ids=["neither", "both"])
def test_a_patch_is_captured_of_an_adapter_or_of_a_tuned_model(given):
    with pytest.raises(PortLLMError, match="not both"):
        portllm.capture(**given, **PLACES)


@pytest.mark.parametrize(
    ("given", "stray"),
    [
        ({"adapter": "adapter", "rank": 4}, "rank cannot be used with an adapter"),
        ({"adapter": "adapter", "dense": "drop"}, "dense cannot be used with an adapter"),
        ({"tuned": "tuned", "initial": "initial"}, "initial cannot be used with a tuned model"),
    ],
)
def test_what_belongs_to_the_other_way_is_refused_and_not_left_unread(given, stray):
    with pytest.raises(PortLLMError, match=stray):
        portllm.capture(**given, **PLACES)
