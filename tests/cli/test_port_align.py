"""The command that aligns a patch: what it prints, records and exits with."""

import json
import shutil

import pytest
import torch

from tests.language import make_reader
from tests.models import make_adapter, make_evolved

WORDS = ("fever", "cold", "measles", "rest", "tea", "time", "clinic", "risk")


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aligning")
    base = make_reader(folder / "base", dtype=torch.float32)
    evolved = make_evolved(base, folder / "evolved", drift=0.05)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, evolved / name)
    make_adapter(base, folder / "patch", size=0.2, r=10)
    rows = [json.dumps({"one": one, "two": two}) for one in WORDS[:3] for two in WORDS]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "prompts.txt").write_text("\n".join(f"{one} {two}" for one in WORDS[:3] for two in WORDS))
    (folder / "anchors.txt").write_text("\n".join(f"What is a {word}? Rest and tea." for word in WORDS))
    return folder


def align(portllm, story, out, *more, text="prompts.txt"):
    models = ("--base", story / "base", "--evolved", story / "evolved", "--text", story / text)
    how = ("--anchors", story / "anchors.txt", "--answer-tokens", "2", "--device", "cpu", "-q", "-o", out)
    return portllm("port", story / "patch", *models, *how, *more)


@pytest.mark.slow
def test_the_agreement_and_its_interval_are_printed_beside_those_of_addition(portllm, story, tmp_path):
    result = align(portllm, story, tmp_path / "out", "--method", "align", "--agreement", "0")
    assert result.status == 0
    assert "of the old specialist's answers; by addition" in result.out
    assert "95 % interval" in result.out
    assert "nats per token; beyond addition" in result.out


def test_what_falls_short_of_the_agreement_is_written_and_exits_with_3(portllm, story, tmp_path):
    result = align(portllm, story, tmp_path / "out", "--method", "align", "--agreement", "1", "--json")
    found = json.loads(result.out)["record"]["ports"][-1]["evidence"]
    assert found["agreement_high"] < 1, "the case is too easy to tell"
    assert result.status == 3
    assert {"agreement_added", "divergence_added", "general_nats_error", "head_gate"} <= found.keys()
    assert "has fewer of the old answers than 100.0 %" in result.err
    assert (tmp_path / "out" / "patch.json").is_file()


@pytest.mark.slow
def test_of_written_answers_the_tokens_are_printed_and_judged(portllm, story, tmp_path):
    how = ("--method", "align", "--answer-tokens", "24")
    found = json.loads(align(portllm, story, tmp_path / "one", *how, "--json").out)["record"]["ports"][-1]["evidence"]
    whole, token = found["agreement_high"], found["token_agreement_high"]
    assert whole < token, "the case cannot tell one from the other"
    result = align(portllm, story, tmp_path / "two", *how, "--agreement", str((whole + token) / 2))
    assert result.status == 0
    assert "of the old answers' tokens" in result.out
    assert "of the tokens of its answers, given those before; by addition" in result.out


@pytest.mark.slow
def test_auto_goes_no_further_than_the_agreement_that_is_asked_for(portllm, story, tmp_path):
    easy = align(portllm, story, tmp_path / "easy", "--method", "auto", "--agreement", "0", "--json")
    assert "refit" not in json.loads(easy.out)["record"]["ports"][-1]["method"]
    hard = align(portllm, story, tmp_path / "hard", "--method", "auto", "--agreement", "1", "--json")
    assert "refit" in json.loads(hard.out)["record"]["ports"][-1]["method"]


def test_options_of_prompts_need_prompts(portllm, story, tmp_path):
    result = portllm("port", story / "patch", "--evolved", story / "evolved", "--prompt", "{q}", "-o", tmp_path / "out")
    assert result.status == 2
    assert "require --text" in result.err


@pytest.mark.slow
def test_rows_through_a_template_are_the_prompts_that_they_make(portllm, story, tmp_path):
    how = ("--method", "align", "--agreement", "0", "--json")
    lines = align(portllm, story, tmp_path / "lines", *how)
    rows = align(portllm, story, tmp_path / "rows", *how, "--prompt", "{one} {two}", text="rows.jsonl")
    found = [json.loads(result.out)["record"]["ports"][-1]["evidence"] for result in (lines, rows)]
    assert found[0] == found[1]


@pytest.mark.slow
def test_rows_with_answers_alone_are_asked_too(portllm, story, tmp_path):
    rows = [json.dumps({"one": one, "two": two, "kind": two}) for one in WORDS[:5] for two in WORDS]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    models = ("--base", story / "base", "--evolved", story / "evolved", "--data", tmp_path / "rows.jsonl")
    how = ("--prompt", "{one} {two}", "--completion", "kind", "--anchors", story / "anchors.txt", "--device", "cpu")
    result = portllm("port", story / "patch", "--method", "align", *models, *how, "-q", "-o", tmp_path / "out")
    assert "right answers of 10 rows, by which it was chosen" in result.out


def test_prompts_are_read_or_drawn_but_not_both(portllm, story, tmp_path):
    result = align(portllm, story, tmp_path / "out", "--method", "align", "--draw", "16")
    assert result.status == 1
    assert "Pass --text or --draw, not both" in result.err


def test_nothing_is_drawn_where_nobody_knows_how_prompts_were_made(portllm, story, tmp_path):
    models = ("--base", story / "base", "--evolved", story / "evolved", "--draw", "16", "--method", "align")
    result = portllm("port", story / "patch", *models, "-q", "-o", tmp_path / "out")
    assert result.status == 1
    assert "does not record how prompts were made, so none can be drawn. Pass --prompt" in result.err
