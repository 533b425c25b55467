"""The library as a person in a notebook meets it: the tour runs, and what it leaves is shown in a line or a table."""

import ast
import json
import runpy
import textwrap
from pathlib import Path

import pytest

import portllm
from portllm.running.model import load_tokenizer
from tests.language import make_reader
from tests.models import make_adapter, make_evolved
from tests.test_docs import python_in

ROOT = Path(__file__).parents[2]
ROWS = [
    {"question": "what causes measles?", "kind": "cause"},
    {"question": "how is a fever treated?", "kind": "treatment"},
    {"question": "what causes a cold?", "kind": "cause"},
]
LONGEST_LINE = 160


def write_models(folder):
    """What the examples ask for."""
    make_reader(folder / "base-v1")
    make_evolved(folder / "base-v1", folder / "base-v2", drift=0.003)
    load_tokenizer(folder / "base-v1").save_pretrained(folder / "base-v2")
    make_adapter(folder / "base-v1", folder / "adapter", r=2)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    held_out = [
        {"question": "what causes a fever?", "kind": "cause"},
        {"question": "how is a cold treated?", "kind": "treatment"},
    ]
    (folder / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    others = (json.dumps({"question": f"what causes {name}?"}) + "\n" for name in ("a cold", "a fever", "measles"))
    (folder / "questions.jsonl").write_text("".join(others))


@pytest.fixture(scope="module")
def toured(tmp_path_factory):
    """What the tour has named, after it ran."""
    folder = tmp_path_factory.mktemp("tour")
    write_models(folder)
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setenv("PORTLLM_CACHE", str(folder / "cache"))
        patcher.chdir(folder)
        return runpy.run_path(str(ROOT / "examples" / "tour.py"))


RESULTS = (
    portllm.CheckReport,
    portllm.MergeReport,
    portllm.Comparison,
    portllm.Certificate,
)


def test_every_value_of_the_tour_is_shown_in_a_line(toured):
    shown = {name: repr(value) for name, value in toured.items() if type(value).__module__.startswith("portllm")}
    assert len(shown) > len(RESULTS)
    assert {name: text for name, text in shown.items() if len(text) > LONGEST_LINE or "\n" in text} == {}


@pytest.mark.parametrize("kind", RESULTS, ids=lambda kind: kind.__name__)
def test_a_notebook_shows_a_result_as_a_table(toured, kind):
    result = next(value for value in toured.values() if isinstance(value, kind))
    shown = result._repr_html_()
    assert "<table" in shown
    assert "<html" not in shown


def test_what_a_table_shows_of_a_check_is_the_verdict_of_each_patch(toured):
    report = toured["report"]
    assert all(f"<td>{patch.name}" in report._repr_html_() for patch in report.patches)


def run_cell(source, names):
    """What a notebook's cell shows: its last expression as a table, else in a line; None where it ends otherwise."""
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        body, last = [*body, last], None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)  # noqa: S102 (that it runs is the test)
    if last is None:
        return None
    value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)  # noqa: S307
    return value._repr_html_() if hasattr(value, "_repr_html_") else repr(value)


def test_the_notebook_runs_from_top_to_bottom_and_shows_a_decision_at_each_step(tmp_path, monkeypatch):
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "base-updated.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {}
    shown = "".join(filter(None, (run_cell(cell, names) for cell in cells)))
    for said in ("holds aligned", "points of accuracy", "Loses at most", "kept gain", "True"):
        assert said in shown, said
    assert not any(cell.get("outputs") for cell in notebook["cells"])


@pytest.mark.parametrize("page", ["README.md", "docs/library.md", "the package's docstring"])
def test_the_python_of_a_page_runs_as_it_stands(page, tmp_path, monkeypatch):
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    if page.endswith(".md"):
        code = python_in((ROOT / page).read_text(encoding="utf-8"))
    else:
        lines = [line for line in portllm.__doc__.splitlines() if line.startswith("    ")]
        code = textwrap.dedent("\n".join(["    import portllm", *lines]))
    assert "portllm.port(" in code
    (tmp_path / "page.py").write_text(code)
    named = runpy.run_path("page.py")
    assert named["merged"].into.fingerprint == named["ported"].record.base.fingerprint
