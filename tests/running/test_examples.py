import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portllm.errors import DataError
from portllm.running.examples import (
    Example,
    ExampleFormat,
    Template,
    completion_text,
    read_examples,
    read_prompts,
    read_texts,
)

FORMAT = ExampleFormat(prompt="Question: {question}\nType:", completion="type")


@pytest.fixture
def write(tmp_path):
    def to_file(content):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


def test_a_row_becomes_a_prompt_and_a_completion(write):
    path = write('{"question": "why?", "type": "cause", "more": [1]}\n')
    assert read_examples(path, FORMAT) == [Example(prompt="Question: why?\nType:", completion="cause")]


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{a}{b}{a}", "121"),
        ("{{a}}", "{a}"),
        ("{{{a}}}", "{1}"),
        ("}}{{", "}{"),
        ("no field", "no field"),
        ("", ""),
    ],
)
def test_doubled_braces_stand_for_braces(text, filled):
    assert Template(text).fill({"a": "1", "b": "2"}) == filled


@given(st.text())
def test_a_text_with_its_braces_doubled_fills_to_itself(text):
    template = Template(text.replace("{", "{{").replace("}", "}}"))
    assert template.fields == ()
    assert template.fill({}) == text


@given(st.dictionaries(st.sampled_from(["a", "b", "long_name", "with-dash"]), st.text(), min_size=4))
def test_values_are_put_in_as_they_are_whatever_braces_they_have(values):
    template = Template("<{a}|{b}|{long_name}|{with-dash}>")
    assert template.fill(values) == f"<{values['a']}|{values['b']}|{values['long_name']}|{values['with-dash']}>"


@pytest.mark.parametrize(
    "text",
    ["{", "}", "{a", "a}", "{}", "{ a}", "{a.b}", "{a[0]}", "{a!r}", "{a:>10}", "{0}", "{{a}", "{a}}", "{{{a}}"],
)
def test_anything_but_a_plain_name_between_braces_is_refused(text):
    with pytest.raises(DataError, match="is not a placeholder"):
        Template(text)


def test_half_of_a_surrogate_pair_in_a_row_is_told_with_its_line_and_a_whole_one_is_read(write):
    path = write(r'{"question": "\ud83d\ude00", "type": "a"}' + "\n" + r'{"question": "\ud800", "type": "a"}')
    with pytest.raises(
        DataError, match=r"rows\.jsonl': 1 of 2 rows[^\0]*line 2: is not a valid row: it contains an unpaired surrogate"
    ):
        read_examples(path, FORMAT)


def test_a_template_that_is_no_text_is_refused():
    with pytest.raises(DataError, match="is not valid UTF-8"):
        Template("{question} \udcff")


def test_a_template_without_a_field_is_refused():
    with pytest.raises(DataError, match="names no field"):
        ExampleFormat(prompt="Question:", completion="type")


def test_a_prompt_that_shows_the_completion_is_refused():
    with pytest.raises(DataError, match="leaves nothing to learn"):
        ExampleFormat(prompt="{question} {type}", completion="type")


@pytest.mark.parametrize(
    ("prompt", "joined"), [("Type:", " cause"), ("Type: ", "cause"), ("Type:\n", "cause"), ("", "cause")]
)
def test_one_space_stands_between_prompt_and_completion_unless_the_prompt_ends_in_whitespace(prompt, joined):
    assert completion_text(prompt, "cause") == joined


def test_whitespace_around_a_completion_is_taken_off_and_that_of_a_prompt_kept(write):
    path = write('{"question": " why? ", "type": " cause\\n"}\n')
    assert read_examples(path, FORMAT) == [Example(prompt="Question:  why? \nType:", completion="cause")]


@pytest.mark.parametrize(
    ("value", "text"),
    [("7", "7"), ("1e5", "1e5"), ("-0.10", "-0.10"), ("true", "true"), ("false", "false"), ("1" * 5000, "1" * 5000)],
)
def test_numbers_and_booleans_become_the_text_that_stands_in_the_file(write, value, text):
    path = write(f'{{"question": {value}, "type": {value}}}\n')
    assert read_examples(path, FORMAT) == [Example(prompt=f"Question: {text}\nType:", completion=text)]


def test_a_byte_order_mark_crlf_and_blank_lines_are_passed_over(write):
    path = write(b'\xef\xbb\xbf{"question": "a", "type": "b"}\r\n\r\n  \n{"question": "c", "type": "d"}')
    assert [example.completion for example in read_examples(path, FORMAT)] == ["b", "d"]


def test_line_separators_of_unicode_inside_a_text_do_not_end_a_row(write):
    path = write('{"question": "a\u2028b\u0085c", "type": "d"}\n')
    assert read_examples(path, FORMAT)[0].prompt == "Question: a\u2028b\u0085c\nType:"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"question": "a"}', "no field 'type' (the row has 'question')"),
        ("{}", "no field 'question'; no field 'type' (the row has no fields)"),
        ('{"question": null, "type": "b"}', "field 'question' is null"),
        ('{"question": ["a"], "type": "b"}', "field 'question' is a list"),
        ('{"question": "a", "type": {"b": 1}}', "field 'type' is an object"),
        ('{"question": "a", "type": " "}', "field 'type' is empty"),
        ('["question", "type"]', "is a list; expected an object"),
        ('"question"', "is a text or a number; expected an object"),
        ("null", "is null; expected an object"),
        ("true", "is a boolean; expected an object"),
        ('{"question": "a", "type": "b"', "is not JSON"),
        ('{"question": "a", "type": "b"} {}', "is not JSON: Extra data at character 32"),
        ('{"question": "a", "type": NaN}', "is not a valid row: NaN is not valid JSON"),
        ('{"question": "a", "type": "b", "type": "c"}', "is not a valid row: duplicate key 'type'"),
        ("[" * 100_000, "is not a valid row: it is nested too deeply"),
        (b'{"question": "\xff", "type": "b"}', "byte 15 is not UTF-8"),
        (rb'{"question": "\ud800", "type": "b"}', "is not a valid row: it contains an unpaired surrogate"),
    ],
)
def test_a_row_that_does_not_fit_is_told_with_its_line_and_reason(write, line, problem):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(b'{"question": "a", "type": "b"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_examples(path, FORMAT)
    assert "1 of 2 rows do not match" in str(caught.value)
    assert f"line 3: {problem}" in str(caught.value)


def test_a_blank_prompt_is_a_problem_of_its_row(write):
    path = write('{"question": " ", "type": "b"}\n')
    with pytest.raises(DataError, match="line 1: the prompt is blank"):
        read_examples(path, ExampleFormat(prompt="{question}", completion="type"))


def test_all_problems_are_counted_and_ten_are_shown(write):
    rows = [f'{{"question": "a", "other{number}": 1}}\n' for number in range(13)]
    path = write("".join(rows) + '{"question": "a", "type": "b"}\n')
    with pytest.raises(DataError) as caught:
        read_examples(path, FORMAT)
    message = str(caught.value)
    assert "13 of 14 rows do not match" in message
    assert [f"line {number}:" in message for number in (1, 10, 11)] == [True, True, False]
    assert message.endswith("and 3 more.")


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff"])
def test_a_file_without_rows_is_refused(write, content):
    with pytest.raises(DataError, match="has no rows"):
        read_examples(write(content), FORMAT)


def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_examples(path, FORMAT)


def test_texts_are_made_of_a_template_alone(write):
    path = write('{"question": "1 + 1?", "answer": 2}\n')
    assert read_texts(path, "{question}\n{answer}") == ["1 + 1?\n2"]


def test_a_blank_text_is_refused(write):
    with pytest.raises(DataError, match="line 1: the text is blank"):
        read_texts(write('{"answer": ""}\n'), "{answer}")


def test_reading_examples_does_not_import_torch():
    code = "import sys, portllm.running.examples; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- prompts without completions


def test_prompts_need_no_completion(write):
    path = write('{"question": "why?"}\n\n{"question": 7, "other": null}\n')
    assert read_prompts(path, "{question}", completion="type") == (["why?", "7"], None)
    assert read_prompts(path, "{question}", completion=None) == (["why?", "7"], None)


def test_completions_are_read_where_all_rows_have_one(write):
    path = write('{"question": "why?", "type": " cause "}\n{"question": "how?", "type": "means"}\n')
    assert read_prompts(path, "{question}", completion="type") == (["why?", "how?"], ["cause", "means"])
    assert read_prompts(path, "{question}", completion=None) == (["why?", "how?"], None)


def test_completions_of_some_rows_alone_are_refused(write):
    path = write('{"question": "why?", "type": "cause"}\n{"question": "how?", "type": ""}\n{"question": "who?"}\n')
    with pytest.raises(DataError, match="1 of 3 rows have a completion in 'type'"):
        read_prompts(path, "{question}", completion="type")


def test_a_prompt_that_shows_the_answer_is_refused_here_too(write):
    with pytest.raises(DataError, match="leaves nothing to learn"):
        read_prompts(write('{"type": "cause"}'), "{type}", completion="type")
