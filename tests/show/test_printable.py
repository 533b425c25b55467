"""What cannot be printed is escaped; a text to be read keeps its lines and its joined signs."""

import pytest

from portllm.show.printable import one_line, readable


@pytest.mark.parametrize("sign", [chr(code) for code in (*range(32), *range(127, 160), 0x2028, 0x202E, 0x2066, 0xD800)])
def test_a_control_character_is_escaped(sign):
    assert one_line(f"a{sign}b").isprintable()
    assert one_line(f"a{sign}b") == f"a{sign.encode('unicode_escape').decode()}b"


def test_letters_of_every_script_stay():
    for text in ("é", "模型", "модель", "😀", "q_proj"):
        assert one_line(text) == readable(text) == text


def test_a_text_to_be_read_keeps_lines_tabs_and_what_joins_signs():
    text = "a\tb\nनमस्‍ते می‌خواهم 👩‍🔬"
    assert readable(text) == text
    assert readable("a\r\x1b[2J\u202eb\ud800") == "a\\r\\x1b[2J\\u202eb\\ud800"
