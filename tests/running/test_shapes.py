import pytest

from portllm.running.examples import Example
from portllm.running.rows import RowError
from portllm.running.shapes import Conversation, recognize

USER, ANSWER = {"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}


def content(row, *, answered=True):
    return recognize(row, answered=answered).make(row)


@pytest.mark.parametrize(
    ("row", "made"),
    [
        ({"messages": [USER, ANSWER], "id": "7"}, Conversation((USER, ANSWER), (1,))),
        ({"messages": [USER, ANSWER], "prompt": "who?"}, Conversation((USER, ANSWER), (1,))),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, Conversation((USER, ANSWER) * 2, (1, 3))),
        ({"messages": [USER, {**ANSWER, "weight": "0"}, USER, {**ANSWER, "weight": "1"}]},
         Conversation((USER, ANSWER) * 2, (3,))),
        ({"messages": [USER, {**ANSWER, "refusal": None}]}, Conversation((USER, ANSWER), (1,))),
        ({"messages": [{**USER, "content": [{"type": "text", "text": "who?"}]}, ANSWER]},
         Conversation((USER, ANSWER), (1,))),
        ({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, Conversation((USER, ANSWER) * 2, (3,))),
        ({"prompt": "1 + 1 =", "completion": " 2"}, Example("1 + 1 =", " 2")),
        ({"text": "a whole text"}, "a whole text"),
    ],
)  # fmt: skip
def test_a_row_is_recognized_by_its_fields(row, made):
    assert content(row) == made


@pytest.mark.parametrize(
    "row", [{"question": "who?"}, {"text": "who?", "label": "person"}, {"prompt": "who?"}, {"messages": "who?"}, {}]
)
def test_a_row_of_no_known_shape_is_not_guessed_at(row):
    assert recognize(row, answered=True) is None


def test_where_nobody_has_to_answer_a_prompt_is_enough():
    assert content({"prompt": "who?"}, answered=False) == Example("who?", "")
    assert content({"prompt": [USER]}, answered=False) == Conversation((USER,))
    assert content({"messages": [USER]}, answered=False).asked == (USER,)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "field 'messages' is empty"),
        ({"messages": [USER], "tools": [{}]}, "has tools"),
        ({"messages": ["who?"]}, "message 1 of 'messages' is a text"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 of 'messages' has no 'content'"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "is a tool call, which is not"),
        ({"messages": [{"from": "human", "value": "who?"}]}, "ShareGPT"),
        ({"messages": [{**USER, "content": [{"type": "image"}]}]}, "'content' is more than text"),
        ({"messages": [USER, {**ANSWER, "weight": "0.5"}]}, "the weight 0.5"),
        ({"prompt": "who?", "completion": " "}, "field 'completion' is blank"),
    ],
)
def test_what_a_message_cannot_say_is_refused(row, said):
    with pytest.raises(RowError, match=said):
        content(row)
