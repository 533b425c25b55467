"""evaluate as a user calls it: rows of one's own, or a task of lm-evaluation-harness."""

import json
import re

import pytest

from tests.evaluating.harness.conftest import ROWS, write_rows
from tests.language import make_reader

SHORT = ("--max-tokens", "60", "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_rows(folder / "sst2" / "validation.jsonl", ROWS["sst2"])
    return folder


@pytest.fixture
def models(portllm, rows, tmp_path):
    """Options that name a tiny model, a patch, and itself as the evolved one."""
    base = make_reader(tmp_path / "base")
    write_rows(tmp_path / "trained-on.jsonl", ROWS["sst2"][:2])
    data = ("--data", tmp_path / "trained-on.jsonl", "--prompt", "{sentence}", "--completion", "label")
    trained = portllm("train", "--base", base, *data, "--steps", "1", *SHORT, "-o", tmp_path / "patch")
    assert trained.status == 0, trained.err
    patch = tmp_path / "patch"
    return ("--base", base, "--patch", patch, "--evolved", base, "--ported", patch, *SHORT)


def test_the_rows_of_a_file_are_judged_as_the_patch_was_trained(portllm, models, rows):
    result = portllm("evaluate", *models, "--data", rows / "sst2" / "validation.jsonl", "--limit", "4", "--json")
    assert result.status == 0, result.err
    told = json.loads(result.out)
    assert (told["kind"], told["labels"], told["n_rows"]) == ("labels", ["0", "1"], 4)


def test_other_ports_are_set_beside_the_first_by_the_names_of_their_methods(portllm, models, rows, tmp_path):
    carried = portllm("port", tmp_path / "patch", "--evolved", tmp_path / "base", "-o", tmp_path / "ported")
    assert carried.status == 0, carried.err
    others = ("--ported", tmp_path / "ported") * 2
    asked = ("--data", rows / "sst2" / "validation.jsonl", "--html", tmp_path / "page.html")
    told = json.loads(portllm("evaluate", *models, *others, *asked, "--json").out)
    first, *rivals = told["rows"][3:]
    assert first["name"] == "evolved + ported"
    assert [row["name"] for row in rivals] == ["evolved + ported by add", "evolved + ported by add 2"]
    assert [row["score"] for row in rivals] == [first["score"]] * 2  # the same patch on the same model
    assert [(row["port_change"] or {}).get("value") for row in (first, *rivals)] == [None, 0.0, 0.0]
    assert "beside it" in (tmp_path / "page.html").read_text()


def test_a_limit_that_few_rows_cannot_show_to_be_kept_gives_status_three(portllm, models, rows):
    asked = ("--data", rows / "sst2" / "validation.jsonl", "--json", "--max-loss")
    for limit, status in ((2, 3), (100, 0)):
        result = portllm("evaluate", *models, *asked, limit)
        assert result.status == status, result.err
        decided = json.loads(result.out)["decision"]
        assert (decided["max_loss"], decided["met"]) == (limit / 100, status == 0)
        assert f"your limit of {limit} points" in decided["text"]


def test_the_page_shows_the_scores_that_json_has(portllm, models, rows, tmp_path):
    asked = ("--data", rows / "sst2" / "validation.jsonl", "--json", "--html", tmp_path / "page.html")
    result = portllm("evaluate", *models, *asked)
    assert result.status == 0, result.err
    page = (tmp_path / "page.html").read_text()
    for row in json.loads(result.out)["rows"]:
        name, share = re.escape(row["name"]), f"{100 * row['score']['value']:.1f} %"
        assert re.search(f">{name}</th><td[^>]*>{share} \\(", page)
    assert portllm("evaluate", *models, *asked).status == 1
    assert portllm("evaluate", *models, *asked, "--overwrite").status == 0
    assert (tmp_path / "page.html").read_text() == page


def test_a_task_of_the_harness_is_set_side_by_side_with_its_own_metrics(portllm, models, rows):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")
    task = ("--task", "sst2", "--data", rows)
    told = json.loads(portllm("evaluate", *models, *task, "--json").out)
    assert (told["kind"], told["n_rows"]) == ("lm-evaluation-harness", 5)
    assert [row["name"] for row in told["rows"]] == ["base", "base + patch", "evolved", "evolved + ported"]
    assert all(row["metrics"] == {"acc,none": row["score"]["value"]} for row in told["rows"])
    shown = portllm("evaluate", *models, *task, "--limit", "3")
    assert (shown.status, shown.err) == (0, "")
    assert "3 rows, judged by lm-evaluation-harness" in shown.out
    assert "acc,none of lm-evaluation-harness: base 0." in shown.out


@pytest.mark.parametrize(
    "options",
    [(), ("--task", "sst2", "--prompt", "{sentence}"), ("--task", "sst2", "--judge", "text")],
    ids=" ".join,
)
def test_rows_are_asked_for_in_one_way(portllm, models, options):
    assert portllm("evaluate", *models, *options).status == 2
