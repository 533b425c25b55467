"""What tokens count in a refit, and that neither the length of answers nor that of general text shifts the balance."""

import pytest
import torch

from portllm.methods.align import Refit
from portllm.methods.contract import Block, Kind

HOW = Refit(rho=1.0, omega=0.25, general=0.5, own=4)


def block(*kinds):
    return Block(
        torch.ones(len(kinds), 3), torch.ones(len(kinds), 2), torch.tensor(kinds), torch.ones(len(kinds)) / len(kinds)
    )


def counted(blocks):
    """What prompts count, and general text, of all."""
    weights, kinds = torch.cat(HOW.weights(blocks)), torch.cat([each.kind for each in blocks])
    of_general = float(weights[kinds == Kind.GENERAL].sum())
    return float(weights.sum()) - of_general, of_general


ASKED = block(Kind.FIRST, Kind.PROMPT, Kind.PROMPT, Kind.ANSWER)
TEXT = block(Kind.FIRST, Kind.GENERAL, Kind.GENERAL)


@pytest.mark.parametrize("blocks", [(ASKED, TEXT), (ASKED, TEXT, TEXT, TEXT), (ASKED, ASKED, ASKED, TEXT)])
def test_general_text_counts_its_share_of_the_prompts_however_long_either_is(blocks):
    prompts, general = counted(blocks)
    assert prompts > 0
    assert general == pytest.approx(HOW.general * prompts)


def test_without_general_text_the_prompts_count_what_they_do_beside_it():
    assert HOW.weights([ASKED])[0].equal(HOW.weights([ASKED, TEXT])[0])
    assert HOW.weights([ASKED])[0].tolist() == [0.0, 0.0625, 0.0625, 0.25]
