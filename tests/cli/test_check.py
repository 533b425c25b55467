"""`check` as a user calls it: the verdict first, its exit status, JSON, several patches, a model of the hub."""

import json
import re
import shutil

import pytest

from portllm.checking import forecast
from portllm.show.numbers import three_percent
from tests.checking.test_forecast import KNOWN

SHORT = 0.00003


@pytest.fixture
def run(portllm, tiny):
    def run(*patches, evolved=None, more=()):
        evolved = evolved or tiny("evolved", drift=SHORT)
        return portllm("check", *patches, "--base", tiny("base"), "--evolved", evolved, *more)

    return run


def test_the_first_word_is_the_verdict_and_the_status_says_it_too(run, tiny):
    holds = run(tiny("adapter"))
    assert (holds.status, holds.out.split(":")[0]) == (0, "holds")
    uncertain = run(tiny("adapter"), evolved=tiny("evolved"))
    assert (uncertain.status, uncertain.out.split(":")[0]) == (3, "uncertain")
    lost = run(tiny("adapter"), evolved=tiny("base", seed=7))
    assert (lost.status, lost.out.split(":")[0]) == (3, "will not hold")
    refused = run(tiny("adapter"), evolved=tiny("base", inner=24))
    assert (refused.status, refused.out.split(":")[0]) == (3, "cannot be ported")
    assert "the delta is (out=20, in=12)" in refused.out


def test_the_tables_name_every_kind_of_module_and_every_layer(run, tiny):
    result = run(tiny("adapter"), more=("--by-layer", "--full", "--quiet"))
    for kind in ("self_attn.q_proj", "mlp.down_proj", "model.embed_tokens"):
        assert f"\n  {kind} " in result.out
    assert "\n  model.layers.1 " in result.out
    assert "every weight of both" in result.out


def test_every_percentage_of_the_tables_has_three_digits(run, tiny):
    evolved = tiny("evolved", drift=0.002)  # so much that every tensor moved
    shown = run(tiny("adapter"), evolved=evolved, more=("--by-layer", "--full", "--quiet")).out
    tables = shown.split("drift by kind of module")[1]
    shown = re.findall(r"([0-9.]+) %", tables)
    assert any(number.endswith("0") for number in shown)
    assert {len(number.replace(".", "").lstrip("0")) for number in shown} == {3}


def test_the_forecast_is_a_line_of_the_patch_and_a_column_of_several(run, tiny, monkeypatch):
    monkeypatch.setattr(forecast, "shipped", lambda: KNOWN)
    one = run(tiny("adapter"), evolved=tiny("evolved", drift=0.002)).out
    assert re.search(r"\n  forecast +\d+ % \[\d+ %, \d+ %\] in loss, \d+ % \[\d+ %, \d+ %\] in accuracy: of ", one)
    assert "with 90 % interval; fitted on 20 patches on 5 updates of a small model\n" in one
    far = run(tiny("adapter"), evolved=tiny("evolved", drift=1.0)).out
    assert "of a small model; an extrapolation, since these are outside the fitted range: drift\n" in far
    several = run(tiny("adapter"), tiny("adapter", r=2)).out
    assert re.search(r"verdict +patch +forecast +size", several)
    (patch,) = json.loads(run(tiny("adapter"), more=("--json",)).out)["patches"]
    for target in ("loss", "accuracy"):
        found = patch["forecast"][target]
        assert 0 <= found["low"] <= found["retention"] <= found["high"] <= 1


def test_as_json_it_is_the_whole_report(run, tiny):
    report = json.loads(run(tiny("adapter"), more=("--json",)).out)
    assert report["update"]["mode"] == "sampled"
    (patch,) = report["patches"]
    assert patch["verdict"] == "holds"
    assert patch["reasons"][0]["threshold"]["source"].startswith("ours")
    assert len(patch["tensors"]) == 14


def test_a_page_changes_neither_what_is_printed_nor_the_status(run, tiny, tmp_path):
    uncertain = tiny("evolved")
    plain, paged = run(tiny("adapter"), evolved=uncertain), run(
        tiny("adapter"), evolved=uncertain, more=("--html", tmp_path / "page.html")
    )  # fmt: skip
    assert (paged.status, paged.out) == (plain.status, plain.out) == (3, plain.out)
    assert paged.err == f"page {tmp_path / 'page.html'}\n"
    assert "<!DOCTYPE html>" in (tmp_path / "page.html").read_text()


def test_a_page_and_json_come_from_the_same_values(run, tiny, tmp_path):
    told = json.loads(run(tiny("adapter"), more=("--json", "--html", tmp_path / "page.html")).out)
    (patch,) = told["patches"]
    page = (tmp_path / "page.html").read_text()
    assert len(patch["layers"]) == 14
    assert all(f">{three_percent(cell['relative_size'])}</td>" in page for cell in patch["layers"])


def test_a_page_that_is_there_is_refused_before_anything_is_read(portllm, tmp_path):
    (tmp_path / "page.html").write_text("<!DOCTYPE html>old")
    asked = ("check", "nothing", "--base", "none", "--evolved", "none", "--html", tmp_path / "page.html")
    result = portllm(*asked)
    assert result.status == 1
    assert "page.html': already exists" in result.err
    assert "no such folder" in portllm(*asked, "--overwrite").err
    assert (tmp_path / "page.html").read_text() == "<!DOCTYPE html>old"


def test_a_script_may_pass_overwrite_where_nothing_is_written(run, tiny):
    assert run(tiny("adapter"), more=("--overwrite",)).status == 0


def test_several_patches_are_one_table_and_one_that_cannot_be_opened_does_not_stop_the_others(run, tiny, tmp_path):
    team = tmp_path / "team"
    for name, adapter in (("a", tiny("adapter")), ("b", tiny("adapter", seed=5)), ("c", tiny("adapter", r=2))):
        shutil.copytree(adapter, team / name)
    both = run(team)
    assert both.status == 0
    assert both.out.startswith(f"3 patches on {tiny('evolved', drift=SHORT)}: 3 holds\n")
    (team / "b" / "adapter_model.safetensors").unlink()
    broken = run(team, more=("--json",))
    assert broken.status == 1
    assert [sorted(patch)[:2] for patch in json.loads(broken.out)["patches"]][-1] == ["error", "patch"]


def test_a_patch_that_is_not_there_is_an_error(run, tmp_path):
    result = run(tmp_path / "nothing")
    assert result.status == 1
    assert "no such folder" in result.err


def test_a_patch_of_another_base_is_refused_unless_it_is_meant(portllm, tiny, tmp_path):
    portllm("capture", "--adapter", tiny("adapter"), "--base", tiny("base"), "-o", tmp_path / "patch")
    models = ("--base", tiny("base", seed=3), "--evolved", tiny("base", seed=3))
    refused = portllm("check", tmp_path / "patch", *models)
    assert (refused.status, refused.out.split(":")[0]) == (3, "cannot be ported")
    assert portllm("check", tmp_path / "patch", *models, "--allow-other-base").status == 0


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    from tests.certifying.certified import make_story, write_questions

    folder = tmp_path_factory.mktemp("story")
    return make_story(folder), write_questions(folder / "questions.jsonl")


@pytest.fixture
def read(portllm, story):
    """Checks the story's patch on prompts."""
    folders, questions = story
    models = ("--base", folders.base, "--evolved", folders.evolved)

    def read(*more, patches=(folders.patch,)):
        return portllm("check", *patches, *models, "--text", questions, "--quiet", "--device", "cpu", *more)

    return read


def test_prompts_add_a_section_and_a_doubt_where_answers_begin_otherwise(portllm, story, read):
    folders, _ = story
    without = portllm("check", folders.patch, "--base", folders.base, "--evolved", folders.evolved)
    result = read()
    before, after = (said.out.split("\n\n")[0].splitlines() for said in (without, result))
    begun = re.compile(r"  - by addition, [\d.]+ % of 30 answers begin as the old specialist")
    doubts = [line for line in after if begun.match(line)]
    assert len(doubts) == 1
    rest = [
        [line for line in said if line not in doubts and "it keeps of retraining" not in line]
        for said in (before, after)
    ]
    assert rest[0] == rest[1]  # but for the forecast, which prompts change
    section = next(part for part in result.out.split("\n\n") if part.startswith("on 30 prompts"))
    shown = [line.split("  ")[1] for line in section.splitlines()[1:]]
    assert shown == ["effect kept", "agreement", "moved by", "shift", "reads", "adds", "hidden states"]
    assert section not in without.out


def test_gradients_add_two_lines_and_json_has_every_feature(read):
    shown = read("--gradients").out
    assert "\n  first order " in shown
    assert "\n  interference " in shown
    found = json.loads(read("--gradients", "--json").out)["patches"][0]["text"]
    assert {"effect_kept", "effect_change", "cka", "gain_on_evolved", "interference_cosine"} <= found["features"].keys()
    assert len(found["terms"]) == len(found["modules"]) == 14


def test_several_patches_are_a_table_of_the_same_prompts(read, story):
    folders, _ = story
    shown = read(patches=(folders.patch, folders.patch)).out
    (title,) = [line for line in shown.splitlines() if line.startswith("on 30 prompts")]
    rows = shown.split(title)[1].splitlines()[2:4]
    assert rows[0] == rows[1]
    assert str(folders.patch) in rows[0]


def test_what_belongs_to_prompts_needs_them(portllm, story):
    folders, _ = story
    models = ("--base", folders.base, "--evolved", folders.evolved)
    for option in (("--gradients",), ("--prompt", "{question}")):
        result = portllm("check", folders.patch, *models, *option)
        assert result.status == 2
        assert "require --text" in result.err


def test_rows_that_do_not_fit_end_it_before_anything_is_measured(portllm, story, tmp_path):
    folders, _ = story
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "who?"}\n{"question": ["who?"]}\n')
    models = ("--base", folders.base, "--evolved", folders.evolved)
    result = portllm("check", folders.patch, *models, "--text", rows)
    assert (result.status, result.out) == (1, "")
    assert "line 2: field 'question' is a list" in result.err
