"""The commands of a study: what a user sees, and the exit status."""

import json
from pathlib import Path

import pytest

from tests.language import make_reader
from tests.study.small import THEORY, WHOLE, write_study

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A small study's file, beside its data."""
    folder = tmp_path_factory.mktemp("study")
    changes = {"seeds = [0, 1]": "seeds = [0]", "links = 2": "links = 1"}
    return write_study(
        folder,
        make_reader(folder / "reader"),
        more=WHOLE + THEORY,
        replace=changes,
    )


def test_a_study_is_planned_run_and_reported(portllm, small):
    where = ("--output", small.parent / "out")
    dry = portllm("study", "run", small, *where, "--dry-run")
    assert dry.status == 0
    assert "0 of 24 steps are done" in dry.out
    assert "  port_whole.1_kinds_s0_add" in dry.out.splitlines()
    assert not (small.parent / "out").exists()
    done = portllm("study", "run", small, *where, "--data", small.parent, "--device", "cpu")
    assert done.status == 0
    assert "score_whole.1_kinds_s0_retrained: " in done.err
    assert done.err.rstrip().endswith("nothing left")
    assert done.out.startswith("# A small study\n")
    assert "| chain 1, add |" in done.out
    assert "## Port residual" in done.out
    assert portllm("study", "report", small, *where).out == done.out
    assert portllm("study", "report", small, *where, "--html", small.parent / "page.html").out == done.out
    page = (small.parent / "page.html").read_text()
    assert "Not finished" not in page
    assert page.count("<svg") >= 3
    assert "24 of 24 steps are done" in portllm("study", "status", small, *where).out
    results = json.loads(portllm("study", "report", small, *where, "--json").out)
    assert results == json.loads((small.parent / "out" / "results.json").read_text())
    assert json.loads(portllm("study", "status", small, *where, "--json").out)["left"] == []


def test_a_wrong_file_is_refused_with_line_and_key(portllm, small, tmp_path):
    (tmp_path / "wrong.toml").write_text(small.read_text().replace("rank = 2", "rnk = 2"))
    result = portllm("study", "run", tmp_path / "wrong.toml", "--dry-run")
    assert result.status == 1
    assert "patch.rnk: unknown key. Did you mean rank?" in result.err


def test_workers_without_ray_are_wrong_usage(portllm, small):
    result = portllm("study", "run", small, "--workers", 2)
    assert result.status == 2
    assert "--workers requires --ray" in result.err


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_the_shipped_studies_are_valid_and_need_no_weights_to_say_so(portllm, file, tmp_path):
    result = portllm("study", "run", file, "--dry-run", "--json", "-o", tmp_path / "out")
    assert result.status == 0
    plan = json.loads(result.out)
    assert plan["n_done"] == 0
    assert {name.partition("_")[0] for name in plan["left"]} >= {"train", "evolve", "drift", "port", "score"}
    assert not (tmp_path / "out").exists()
