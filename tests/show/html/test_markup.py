"""Text stays text, whatever it says; numbers in attributes are short."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.show.html.markup import Html, element, joined
from tests.show.html.reading import EVIL, Page


@given(st.text(st.characters(), max_size=40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_text_is_markup_in_an_element_or_in_an_attribute(text):
    page = Page(element("p", text, title=text))
    assert page.skeleton == [("p", ("title",))]
    assert page.text.isprintable() or set(page.text) & set("\n\t\u200c\u200d")


def test_what_a_file_tries_is_shown_as_text():
    page = Page(element("p", EVIL))
    assert page.skeleton == [("p", ())]
    assert "<script>alert(1)</script>" in page.text
    assert "\\x1b[2J\\u202e\\ud800" in page.text


def test_markup_is_not_escaped_twice():
    inner = element("b", "a < b")
    assert element("p", inner) == "<p><b>a &lt; b</b></p>"
    assert joined([inner, "&"], by=" & ") == "<b>a &lt; b</b> &amp; &amp;"


def test_what_is_added_to_markup_is_text_again():
    assert not isinstance(element("b", "x") + "<i>", Html)


@pytest.mark.parametrize(("value", "shown"), [(1 / 3, "0.33"), (2.0, "2"), (10, "10"), (0.0, "0"), (-1.5, "-1.5")])
def test_a_number_has_two_decimals_at_most(value, shown):
    assert element("rect", x=value) == f'<rect x="{shown}"></rect>'


def test_names_of_attributes_have_hyphens():
    assert element("meta", http_equiv="a", class_="b") == '<meta http-equiv="a" class="b">'
