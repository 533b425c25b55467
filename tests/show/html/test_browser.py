"""Each page in a real browser: it asks for nothing, complains of nothing, fits a phone, and prints all its numbers."""

import pytest

from portllm.certifying.decision import decide
from portllm.certifying.page import certify_page
from portllm.checking.check import check_weights
from portllm.checking.page import check_page
from portllm.checkpoint.open import open_checkpoint
from portllm.patch.adapter_folder import load_patch
from portllm.study.results.page import study_page
from tests.certifying.test_certificate import WHOLE
from tests.certifying.test_page import DISAGREEMENTS
from tests.evaluating.test_page import COMPARISON, page_of
from tests.show.html.browser import CHROMIUM, opened
from tests.show.html.reading import EVIL, with_texts
from tests.study.results.test_page import RESULTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)"),
]

PHONE, DESK = 390, 1280

COMPLAINTS = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")

LOST_LABELS = """
[...document.querySelectorAll('svg')].flatMap(picture => {
  const frame = picture.getBoundingClientRect();
  return [...picture.querySelectorAll('text')].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
  }).map(text => text.textContent);
})
"""
"""What of the texts in pictures lies outside of its picture."""

HIDDEN_TABLES = "[...document.querySelectorAll('table')].filter(table => !table.checkVisibility()).length"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def checked(tiny):
    patches = [load_patch(tiny("adapter", seed=seed)) for seed in (1, 2)]
    models = {"base": open_checkpoint(tiny("base")), "evolved": open_checkpoint(tiny("evolved"))}
    return lambda count: check_weights(*patches[:count], places=True, **models)


@pytest.fixture(
    params=["check", "check of several", "check of a stranger", "evaluate", "certify", "study"], scope="module"
)
def page(request, checked, tmp_path_factory):
    """A file with each page."""
    texts = {
        "check": lambda: check_page(checked(1)),
        "check of several": lambda: check_page(checked(2)),
        "check of a stranger": lambda: check_page(with_texts(checked(1), EVIL), [(EVIL, EVIL)]),
        "evaluate": lambda: page_of(COMPARISON, title="a patch from v1 to v2"),
        "certify": lambda: certify_page(WHOLE, DISAGREEMENTS, decide(WHOLE)),
        "study": lambda: study_page(RESULTS),
    }
    file = tmp_path_factory.mktemp("pages") / "page.html"
    file.write_text(texts[request.param](), encoding="utf-8")
    return file


def test_it_asks_for_nothing_and_complains_of_nothing(browser, page):
    browser.open(page, width=DESK)
    assert [asked["request"]["url"] for asked in browser.told("Network.requestWillBeSent")] == [page.as_uri()]
    for complaint in COMPLAINTS:
        assert browser.told(complaint) == []
    assert browser.evaluate("document.querySelector('.verdict').innerText.length") > 10
    assert browser.evaluate("document.scripts.length") == 0


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_it_is_not_wider_than_the_window_and_no_label_leaves_its_picture(browser, page, width):
    browser.open(page, width=width)
    assert browser.evaluate("window.innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(LOST_LABELS) == []


def test_the_letters_of_pictures_can_be_read_on_a_phone(browser, page):
    browser.open(page, width=PHONE)
    heights = browser.evaluate(
        "[...document.querySelectorAll('svg text:not([transform])')].map(text => text.getBoundingClientRect().height)"
    )
    assert min(heights, default=99) > 10


def test_it_is_dark_for_whoever_wants_it_dark(browser, page):
    browser.open(page, width=DESK)
    seen = {}
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        seen[scheme] = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    browser.call("Emulation.setEmulatedMedia", features=[])
    assert seen == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}


def test_in_print_the_numbers_are_unfolded(browser, page):
    browser.open(page, width=DESK)
    assert browser.evaluate(HIDDEN_TABLES) > 0
    browser.call("Emulation.setEmulatedMedia", media="print")
    hidden = browser.evaluate(HIDDEN_TABLES)
    printed = browser.call("Page.printToPDF")["data"]
    browser.call("Emulation.setEmulatedMedia", media="")
    assert hidden == 0
    assert printed.startswith("JVBERi0")  # %PDF- in base64
