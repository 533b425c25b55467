"""The frame: the verdict comes first, nothing can be fetched or run, and no style is allowed but the page's own."""

import base64
import hashlib
import re

from portllm.show.headline import Headline
from portllm.show.html.figure import facts, figure, table
from portllm.show.html.markup import element
from portllm.show.html.page import Tile, document, section
from tests.show.html.reading import EVIL, Page

HEADLINE = Headline("bad", "will not hold", ["for a reason"])


def test_the_first_words_are_the_title_and_the_verdict_with_its_reasons():
    page = Page(document("check: a", HEADLINE, [section("More", "text")]))
    shown = [text for text in page.texts if text.strip()]
    assert shown[:5] == ["will not hold | check: a", "check: a", "✗ ", "Will not hold", "for a reason"]


def test_what_was_compared_and_the_numbers_that_decide_have_their_place():
    tile = Tile("Change", "-4 points", "-7 to -1", "bad", "fail, limit: 2 points")
    page = Page(document("a", HEADLINE, [], about={"patch": "tickets"}, tiles=[tile]))
    assert page.shown[1:4] == ["a", "patch", "tickets"]
    at = page.shown.index("Change")
    assert page.shown[at : at + 5] == ["Change", "-4 points", "✗ ", "fail, limit: 2 points", "-7 to -1"]


def test_the_policy_lets_nothing_through_but_the_page_s_own_style():
    text = document("a", HEADLINE, [])
    policy = next(attributes["content"] for name, attributes in Page(text).elements if "http-equiv" in attributes)
    style = re.search("<style>(.*)</style>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.split("; ")[:2] == ["default-src 'none'", f"style-src 'sha256-{digest}'"]


def test_nothing_in_a_page_names_another_file_or_a_program():
    text = document("a", HEADLINE, [table([("a", "b"), ("c", "d")], label="x")])
    page = Page(text)
    assert {"script", "iframe", "img", "object", "form", "a"} & {name for name, _ in page.elements} == set()
    assert [attributes["href"] for name, attributes in page.elements if name == "link"] == ["data:,"]
    assert not any(key.startswith("on") or key in ("src", "style") for _, given in page.elements for key in given)
    assert not re.search(r"url\(|@import|https?:", text)


def test_title_and_reasons_may_say_anything():
    harmless, evil = (
        Page(document(f"a{text}", Headline("good", text, [text]), [section(text, text)])) for text in ("x", EVIL)
    )
    assert evil.skeleton == harmless.skeleton


def test_a_table_names_its_columns_and_rows_for_whoever_cannot_see_it():
    page = Page(table([("model", "score"), ("base", "31 %")], label="scores"))
    assert page.tables == {"scores": [["model", "score"], ["base", "31 %"]]}
    assert [given.get("scope") for name, given in page.elements if name == "th"] == ["col", "col", "row"]


def test_a_picture_has_its_numbers_beside_it():
    page = Page(figure("Score", "how", element("svg"), [("model", "score"), ("base", "31 %")]))
    assert page.tables == {"Score, in numbers": [["model", "score"], ["base", "31 %"]]}
    assert Page(facts({"size": "1 %"})).texts == ["size", "1 %"]
    assert facts({}) == ""
