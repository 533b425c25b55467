"""What a study knows of a patch beforehand comes from prompts, and from nothing that tells one answer from another."""

import pytest

from portllm.live.encoding import Encoder
from portllm.live.examples import Example
from portllm.live.model import load_tokenizer
from portllm.study.check import _asked


@pytest.fixture(scope="module")
def encoder(reader):
    return Encoder(load_tokenizer(reader))


@pytest.mark.parametrize(
    ("completions", "added"),
    [
        (("cause", "treatment"), ""),
        (("a cause", "a treatment"), " a"),
        (("cause", "cause"), ""),
    ],
)
def test_models_are_asked_where_answers_begin_to_differ(encoder, completions, added):
    examples = [Example("what helps? Kind:", completion) for completion in completions]
    asked = _asked(encoder, examples)
    assert {encoder.encode_text(prompt) for prompt in asked} == {encoder.encode_text("what helps? Kind:" + added)}
