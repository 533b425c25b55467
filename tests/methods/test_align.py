"""What tokens count in a refit, and that neither the length of answers nor that of general text shifts the balance."""

import re
from pathlib import Path

import pytest
import torch

from portllm.methods.align import SETTINGS, SPARED, TAIL_RANK, WRITTEN, Refit, kept, refits
from portllm.methods.contract import Block, Comparison, Kind
from tests.methods.chains import TwoChains

DOCS = Path(__file__).parents[2] / "docs"

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


@pytest.mark.parametrize("rank", [1, 8, 9, 16, 17, 24, 32, 48, 64, 128, 200])
def test_a_few_own_factors_are_spared_where_that_halves_what_a_server_needs_and_only_there(rank):
    for own, (*_, most) in zip((each.own for each in refits(rank).values()), SETTINGS, strict=True):
        served, unspared = (2 ** (rank + n + TAIL_RANK - 1).bit_length() for n in (own, most))
        assert most - SPARED <= own <= most
        assert (own == most) == (served == unspared)


def test_patches_of_common_ranks_are_served_in_64_and_128():
    for rank in (8, 16):
        assert [rank + each.own + TAIL_RANK for each in refits(rank).values()] == [64, 128, 128, 128]


@pytest.mark.parametrize("page", ["commands.md", "methods/align.md"])
def test_from_how_many_tokens_on_answers_are_written_is_what_is_said_of_it(page):
    text = " ".join((DOCS / page).read_text(encoding="utf-8").split())
    assert re.search(rf"more than {WRITTEN} (tokens )?on average", text)


@pytest.mark.parametrize(("places", "expected"), [(WRITTEN, [0.0, 1.0]), (WRITTEN + 1, [0.75, 1.0])])
def test_of_longer_answers_each_token_that_is_kept_counts_and_of_labels_the_whole(places, expected):
    streams = TwoChains(None, None, {}, {})
    streams.parts, streams.part_of_place = ("fit", "report"), ("fit",) * places + ("report",) * places
    compared = Comparison(torch.zeros(2).double(), torch.tensor([0.75, 1.0]).double())
    assert kept(compared, streams).tolist() == expected
