"""What the site shows of a term where it stands."""

from scripts.site_terms import EVERYWHERE, TERMS, abbreviations


def test_a_term_shows_its_meaning_and_formula_and_so_does_its_plural():
    page = (
        "| term | formula | meaning |\n| --- | --- | --- |\n| kept gain | `a \\| b` | what is kept |\n| base | | W0 |\n"
    )
    assert list(abbreviations(page)) == ["*[kept gain]: what is kept; a | b", "*[kept gains]: what is kept; a | b"]


def test_the_terms_that_need_an_explanation_have_one_and_no_word_is_left_out_that_is_none():
    page = TERMS.read_text(encoding="utf-8")
    told = "\n".join(abbreviations(page))
    for term in ("retention", "negative flip", "kept gain", "fingerprint", "old specialist"):
        assert f"*[{term}]: " in told
    assert all(f"| {word} |" in page for word in EVERYWHERE)
