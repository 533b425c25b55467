import pytest

import portllm
from portllm.errors import DataError, PortLLMError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"teacher": "patch"}, "teacher and teacher_base must be used together"),
        ({"teacher_base": "base"}, "teacher and teacher_base must be used together"),
        ({"max_new_tokens": 3}, "requires a teacher"),
        ({"teacher": "patch", "teacher_base": "base", "completion": "kind"}, "cannot be used with a teacher"),
    ],
)
def test_what_cannot_be_trained_for_is_refused_before_anything_is_opened(given, said):
    with pytest.raises(PortLLMError, match=said):
        portllm.train("base", data="rows.jsonl", out="patch", **given)


def test_without_a_patch_that_says_them_prompt_and_completion_are_needed(tiny, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "why?", "kind": "cause"}\n')
    with pytest.raises(DataError, match="its rows have 'question', 'kind'; .* Pass --completion"):
        portllm.train(tiny("base"), data=tmp_path / "rows.jsonl", out=tmp_path / "patch", prompt="{question}")
