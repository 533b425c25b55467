import json
import shutil

import pytest

from portllm.errors import DataError
from portllm.patch.adapter_folder import load_patch
from portllm.running.data import chat_template_for, read_data

TALK = [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "me"}]


def write(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"instruction": "q", "input": "i", "output": "a"},
            r"'\{instruction\}\\n\{input\}' --completion output",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, r"--prompt '\{prompt\}' --completion chosen"),
        ({"text": "q", "label": "a"}, r"--prompt '\{text\}' --completion label"),
        ({"conversations": TALK}, "in the shape of ShareGPT. Run: jq -c"),
        ({"data": [{"q": "a"}]}, r"Run: jq -c '.data\[\]'"),
    ],
)
def test_rows_of_no_known_shape_are_named_with_what_makes_prompts_of_them(tmp_path, row, said):
    with pytest.raises(DataError, match=said):
        read_data(write(tmp_path / "rows.jsonl", row))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "human", "content": "q"}]}, "no message of 'assistant' to learn .roles: 'human'"),
        ({"prompt": "q", "completion": "a"}, "field 'messages' is missing"),
    ],
)
def test_a_row_of_another_shape_than_the_first_is_named(tmp_path, row, said):
    first = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(DataError, match=f"line 2: .*{said}"):
        read_data(write(tmp_path / "rows.jsonl", first, row))


def test_what_was_read_is_told_and_recorded(tmp_path):
    data = read_data(write(tmp_path / "rows.jsonl", {"prompt": "q", "completion": " a "}))
    assert str(data).endswith("rows.jsonl': 1 rows, read as rows of 'prompt' and 'completion'")
    assert data.recorded == {"shape": "prompt-completion", "data": data.digest}
    assert data.answers == ("a",)


def test_a_template_that_was_saved_with_the_patch_comes_before_its_bases(tiny, tmp_path):
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    data = read_data(write(tmp_path / "rows.jsonl", talk))
    (tmp_path / "chat_template.jinja").write_text("of the base")
    patch = load_patch(shutil.copytree(tiny("adapter"), tmp_path / "patch"))
    assert chat_template_for(data, patch, folder=tmp_path) == "of the base"
    (tmp_path / "patch" / "chat_template.jinja").write_text("of the patch")
    assert chat_template_for(data, patch, folder=tmp_path) == "of the patch"
    other = load_patch(shutil.copytree(tmp_path / "patch", tmp_path / "other"))
    (tmp_path / "other" / "chat_template.jinja").write_text("another")
    with pytest.raises(DataError, match="different chat templates"):
        chat_template_for(data, patch, other, folder=tmp_path)
