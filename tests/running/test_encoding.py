import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from portllm.errors import DataError
from portllm.running.encoding import Encoder, NoRoomError, encode_rows, pad_left
from tests.language import byte_level_tokenizer, metaspace_tokenizer

VOCABULARY = ["what", "causes", "a", "fever", "measles", "treatment", "cold", "?", ":", "rest"]
WORDS = st.lists(st.sampled_from(VOCABULARY), min_size=1).map(" ".join)


@pytest.fixture(scope="module")
def spaced():
    return Encoder(byte_level_tokenizer())


@pytest.fixture(scope="module")
def marked():
    return Encoder(metaspace_tokenizer())


def tokens(encoder, ids):
    return encoder.tokenizer.convert_ids_to_tokens(list(ids))


def test_a_completion_begins_with_its_space(spaced):
    encoded = spaced.encode("Question: what causes a fever? Kind:", "cause")
    assert tokens(spaced, encoded.completion)[0].startswith("Ġ")
    assert spaced.decode(encoded.prompt) == "Question: what causes a fever? Kind:"
    assert spaced.decode(encoded.completion) == " cause"


def test_prompt_and_completion_together_are_the_text_when_the_border_is_between_tokens(spaced):
    encoded = spaced.encode("Kind:", "treatment")
    assert encoded.prompt + encoded.completion == spaced.encode_text("Kind: treatment")


def test_a_completion_after_a_space_of_the_prompt_has_none_of_its_own(spaced):
    encoded = spaced.encode("Kind: ", "cause")
    assert spaced.decode(encoded.prompt) == "Kind: "
    assert spaced.decode(encoded.completion) == "cause"


def test_where_every_text_begins_with_a_space_the_completion_has_only_one(marked):
    encoded = marked.encode("Kind:", "cause")
    assert encoded.prompt + encoded.completion == marked.encode_text("Kind: cause")
    assert tokens(marked, encoded.prompt)[0] == "<bos>"
    assert "".join(tokens(marked, encoded.completion)) == "▁cause"


@given(prompt=WORDS, one=WORDS, other=WORDS)
def test_the_ids_of_a_prompt_do_not_depend_on_its_completion(spaced, marked, prompt, one, other):
    for encoder in (spaced, marked):
        assert encoder.encode(prompt, one).prompt == encoder.encode(prompt, other).prompt
        assert encoder.encode(prompt + " ", one).prompt == encoder.encode(prompt + " ", other).prompt


@given(prompt=WORDS, completion=WORDS, room=st.integers(0, 30))
def test_a_long_prompt_loses_its_beginning_and_nothing_else(spaced, prompt, completion, room):
    whole = spaced.encode(prompt, completion)
    limit = len(whole.completion) + 1 + room
    if room == 0:
        with pytest.raises(NoRoomError, match="Raise the token limit by") as caught:
            spaced.encode(prompt, completion, max_tokens=limit, reserve=1)
        assert spaced.encode(prompt, completion, max_tokens=limit + caught.value.lacking, reserve=1) == whole
        return
    cut = spaced.encode(prompt, completion, max_tokens=limit, reserve=1)
    assert cut.completion == whole.completion
    assert cut.prompt == whole.prompt[-room:]
    assert cut.n_cut == max(0, len(whole.prompt) - room)


def test_the_mark_at_the_beginning_outlives_a_cut(marked):
    whole = marked.encode("what causes a fever? Kind:", "cause")
    cut = marked.encode("what causes a fever? Kind:", "cause", max_tokens=len(whole.completion) + 4)
    assert cut.prompt == whole.prompt[:1] + whole.prompt[-3:]
    assert cut.n_cut == len(whole.prompt) - 4


def test_a_mark_alone_is_no_prompt(marked):
    completion = marked.encode("Kind:", "cause").completion
    with pytest.raises(DataError, match="Raise the token limit by"):
        marked.encode("what causes a fever?", "cause", max_tokens=len(completion) + 1)


def test_rows_that_do_not_fit_are_told_together_with_the_limit_at_which_they_do(spaced):
    short, long, empty = ("rest",) * 2, ("what causes a fever?", "rest " * 40), ("", "rest")

    def encode(limit, *rows):
        return encode_rows(rows, lambda row: spaced.encode(*row, max_tokens=limit, reserve=1), max_tokens=limit)

    with pytest.raises(DataError) as caught:
        encode(9, *[short] * 2, *[long] * 11, empty)
    first, *each, more, enough = str(caught.value).splitlines()
    assert first == "12 of 14 examples are invalid:"
    assert [line.split(":")[0] for line in each] == [f"  example {number}" for number in range(3, 13)]
    assert more == "  and 2 more."
    limit = int(re.search(r"a limit of (\d+) tokens", enough).group(1))
    assert encode(limit, short, long)[1] == spaced.encode(*long)
    with pytest.raises(DataError) as caught:
        encode(9, empty)
    assert "--max-tokens" not in str(caught.value)


def test_an_end_mark_that_the_tokenizer_adds_is_taken_off():
    ended, plain = Encoder(metaspace_tokenizer(ends_texts=True)), Encoder(metaspace_tokenizer())
    assert ended.encode("Kind:", "cause") == plain.encode("Kind:", "cause")
    assert ended.encode_text("rest and tea") == plain.encode_text("rest and tea")


def test_an_empty_prompt_is_refused(spaced):
    with pytest.raises(DataError, match="the prompt has no tokens"):
        spaced.encode("", "cause")


def test_a_tokenizer_without_an_end_mark_is_refused():
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        Encoder(tokenizer)


@given(st.lists(st.lists(st.integers(3, 9), min_size=1, max_size=7), min_size=1, max_size=5))
def test_padding_is_on_the_left_and_positions_count_from_the_first_token(rows):
    batch = pad_left(rows, device=torch.device("cpu"))
    width = max(map(len, rows))
    for index, row in enumerate(rows):
        assert batch.ids[index, width - len(row) :].tolist() == row
        assert batch.mask[index].tolist() == [0] * (width - len(row)) + [1] * len(row)
        assert batch.positions[index, width - len(row) :].tolist() == list(range(len(row)))
