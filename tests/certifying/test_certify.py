"""Certifying tiny models: what is counted is what each model answers alone, and what follows stands in the file."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from msgspec import structs

from portllm.certifying.bounds import change_interval, upper_bound
from portllm.certifying.certificate import read_certificate
from portllm.certifying.certify import certify, plan_certify, run_certify
from portllm.certifying.inputs import CertifySettings, draw_rows, read_inputs
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import DataError, OutputError, OutputExistsError, PlanRefusedError, PortLLMError
from portllm.evaluating import own_tokens
from portllm.evaluating.scoring import Task, score
from portllm.patch.adapter_folder import load_patch, read_record, write_record
from portllm.running.encoding import Encoder
from portllm.running.examples import Example
from portllm.running.model import attach_adapter, load_model, load_tokenizer
from tests.certifying.certified import CHOICES, PROMPT, make_story, write_questions

BY_CHOICE = CertifySettings(choices=CHOICES)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    return make_story(tmp_path_factory.mktemp("story"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "unlabeled.jsonl")


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "labeled.jsonl", labels=True)


@pytest.fixture
def run(story, tmp_path):
    """`run(data, settings)` certifies the story's port on the CPU."""

    def call(data, settings=BY_CHOICE, **other):
        models = story.models() | other
        out = models.pop("out", tmp_path / "certificate")
        return certify(load_patch(story.patch), data=data, out=out, settings=settings, device="cpu", **models)

    return call


def answers_alone(folder, adapter, data, *, kind):
    """What the model answers when it is scored by itself, as `evaluate` does."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    examples = [Example(PROMPT.format(**row), "tea" if kind == "labels" else "a\nb") for row in rows]
    task = Task(examples=tuple(examples), kind=kind, labels=CHOICES, max_new_tokens=6, batch_size=4)
    device = torch.device("cpu")
    model = load_model(folder, device=device)
    model = model if adapter is None else attach_adapter(model, adapter, name="alone")
    return score(model, Encoder(load_tokenizer(folder)), task, device=device).answers


def differing_rows(one, other):
    return tuple(row for row, (left, right) in enumerate(zip(one, other, strict=True), start=1) if left != right)


# ---- what is counted


@pytest.mark.parametrize("kind", ["choices", "exact"])
def test_the_rows_that_differ_are_those_where_the_models_alone_answer_otherwise(story, questions, run, kind):
    scored = {"choices": "labels", "exact": "text"}[kind]
    before = answers_alone(story.base, story.patch, questions, kind=scored)
    after = answers_alone(story.evolved, story.ported, questions, kind=scored)
    expected = differing_rows(before, after)
    assert 0 < len(expected) < 30  # else the models of this test show nothing
    settings = CertifySettings(kind=kind, choices=CHOICES, max_new_tokens=6)
    certificate = run(questions, settings)
    assert certificate.differing == expected
    assert certificate.n == 30
    assert certificate.bound == upper_bound(len(expected), 30)
    assert certificate.labels is None
    assert certificate.met is None


def test_a_merged_model_stands_for_evolved_and_ported(story, questions, run):
    certificate = run(questions, evolved=None, ported=None, merged=open_checkpoint(story.merged))
    before = answers_alone(story.base, story.patch, questions, kind="labels")
    assert certificate.differing == differing_rows(before, answers_alone(story.merged, None, questions, kind="labels"))
    assert certificate.ported.patch is None


def test_a_port_to_the_same_model_loses_nothing(story, questions, run):
    same = {"evolved": open_checkpoint(story.base), "ported": load_patch(story.patch)}
    certificate = run(questions, replace(BY_CHOICE, wanted=0.1), **same)
    assert certificate.differing == ()
    assert certificate.bound == upper_bound(0, 30) < 0.1
    assert certificate.met is True


def test_right_answers_add_flips_and_an_interval(story, labeled, run):
    rows = [json.loads(line)["kind"] for line in labeled.read_text().splitlines()]
    before = answers_alone(story.base, story.patch, labeled, kind="labels")
    after = answers_alone(story.evolved, story.ported, labeled, kind="labels")
    was, now = ([answer == right for answer, right in zip(side, rows, strict=True)] for side in (before, after))
    negative = sum(old and not new for old, new in zip(was, now, strict=True))
    positive = sum(new and not old for old, new in zip(was, now, strict=True))
    labels = run(labeled).labels
    assert (labels.specialist_right, labels.ported_right) == (sum(was), sum(now))
    assert (labels.negative_flips, labels.positive_flips) == (negative, positive)
    assert labels.bound == upper_bound(negative, 30)
    assert (labels.change_low, labels.change_high) == change_interval(negative, positive, 30)


def test_the_rows_that_differ_are_handed_on_as_text_and_stand_in_no_certificate(story, labeled, tmp_path):
    patch = load_patch(story.patch)
    data = read_inputs(labeled, patch, BY_CHOICE)
    plan = plan_certify(patch, data=data, settings=BY_CHOICE, **story.models())
    found = run_certify(plan, tmp_path / "certificate", device="cpu")
    rows = [json.loads(line) for line in labeled.read_text().splitlines()]
    assert tuple(one.row for one in found.disagreements) == found.certificate.differing
    for one in found.disagreements:
        row = rows[one.row - 1]
        assert (one.prompt, one.right) == (PROMPT.format(**row), row["kind"])
        assert one.before != one.after
    assert "measles" not in (tmp_path / "certificate" / "certificate.json").read_text()


def test_with_right_answers_the_flips_decide_whether_the_bound_is_met(labeled, run):
    certificate = run(labeled)
    assert certificate.labels.bound < certificate.bound
    between = (certificate.labels.bound + certificate.bound) / 2
    assert run(labeled, replace(BY_CHOICE, wanted=between), overwrite=True).met is True


def test_a_certificate_does_not_replace_the_rows_that_it_is_about(labeled, run, tmp_path):
    (tmp_path / "rows").mkdir()
    rows = shutil.copy(labeled, tmp_path / "rows" / "rows.jsonl")
    (tmp_path / "rows" / "certificate.json").write_text("{}")
    with pytest.raises(OutputError, match="which is an input"):
        run(Path(rows), out=tmp_path / "rows", overwrite=True)
    assert Path(rows).read_bytes() == labeled.read_bytes()


def test_free_text_is_compared_token_by_token_and_claims_no_bound(story, questions, run):
    settings = CertifySettings(kind="free", max_new_tokens=6)
    certificate = run(questions, settings)
    assert (certificate.bound, certificate.differing, certificate.labels) == (None, None, None)
    assert 0 < certificate.tokens.same < certificate.tokens.written <= 30 * 6
    assert certificate.tokens.inputs_same < 30


def test_free_text_is_compared_alike_however_few_rows_are_run_together(questions, run, tmp_path, monkeypatch):
    settings = CertifySettings(kind="free", max_new_tokens=6)
    whole = run(questions, settings).tokens
    monkeypatch.setattr("portllm.running.encoding.LOGITS", 1)
    assert run(questions, settings, out=tmp_path / "one by one").tokens == whole


def test_free_text_of_a_model_agrees_with_itself(story, questions, run):
    same = {"evolved": open_checkpoint(story.base), "ported": load_patch(story.patch)}
    tokens = run(questions, CertifySettings(kind="free", max_new_tokens=6), **same).tokens
    assert tokens.same == tokens.written
    assert tokens.inputs_same == 30


def test_never_more_than_one_model_is_in_memory(questions, run, monkeypatch):
    import gc
    import weakref

    alive = []

    def load(*arguments, **options):
        gc.collect()
        assert [model for model in alive if model() is not None] == []
        model = load_model(*arguments, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(own_tokens, "load_model", load)
    run(questions)
    assert len(alive) == 2


# ---- what is written


def test_the_file_says_what_the_function_returns(story, questions, run, tmp_path):
    certificate = run(questions, replace(BY_CHOICE, sample=20, seed=3, wanted=0.9))
    assert read_certificate(tmp_path / "certificate") == certificate


def test_the_same_questions_give_the_same_bytes(questions, run, tmp_path):
    run(questions, out=tmp_path / "one")
    run(questions, out=tmp_path / "two")
    assert (tmp_path / "one" / "certificate.json").read_bytes() == (tmp_path / "two" / "certificate.json").read_bytes()


def test_a_sample_asks_the_rows_that_are_drawn(questions, run):
    whole, part = run(questions), run(questions, replace(BY_CHOICE, sample=12, seed=5), overwrite=True)
    drawn = draw_rows(30, 12, seed=5)
    assert part.n == len(drawn) == 12
    assert part.differing == tuple(row for row in whole.differing if row in drawn)
    assert (part.inputs.rows, part.inputs.sample, part.inputs.seed) == (30, 12, 5)


def test_every_row_is_drawn_as_often_as_any_other():
    counts = torch.zeros(20)
    for seed in range(2000):
        counts[[row - 1 for row in draw_rows(20, 5, seed=seed)]] += 1
    # 2000 draws with a chance of 1/4 each have a standard deviation of 19.4; five of them.
    assert counts.sum() == 2000 * 5
    assert (counts - 500).abs().max() < 97


def test_prompts_that_were_asked_before_are_counted(questions, run, tmp_path):
    twice = tmp_path / "twice.jsonl"
    twice.write_text(questions.read_text() * 2)
    assert run(twice).inputs.repeated == 30


# ---- what is refused


def test_an_output_that_exists_is_refused_before_anything_is_read(story, run, tmp_path):
    (tmp_path / "certificate").mkdir()
    with pytest.raises(OutputExistsError):
        run(tmp_path / "no such file")


def test_the_rows_that_the_patch_was_trained_on_are_refused(story, questions, run, tmp_path):
    folder = shutil.copytree(story.ported, tmp_path / "ported")
    record = read_record(folder)
    import blake3

    data = "blake3:" + blake3.blake3(questions.read_bytes()).hexdigest()
    capture = structs.replace(record.capture, settings={**record.capture.settings, "data": data})
    write_record(folder, structs.replace(record, capture=capture))
    with pytest.raises(PlanRefusedError, match=r"--data: is the file that .*ported was trained on"):
        run(questions, ported=load_patch(folder), allow_other_base=True)  # else it is of another patch
    assert not (tmp_path / "certificate").exists()


def test_a_bound_that_so_few_inputs_cannot_meet_is_refused_with_the_number_that_can(questions, run):
    with pytest.raises(
        PlanRefusedError, match=r"--max-loss 2: .*--bound 0.02.* cannot be met with 30 inputs.* it takes 149"
    ):
        run(questions, replace(BY_CHOICE, wanted=0.02))


def test_a_patch_of_another_model_is_refused(story, questions, run):
    with pytest.raises(PlanRefusedError, match="--ported: .* has the fingerprint"):
        run(questions, ported=load_patch(story.patch))


def test_without_choices_or_right_answers_the_choices_are_asked_for(questions, run):
    with pytest.raises(DataError, match="the choices are not known.*--choices"):
        run(questions, CertifySettings())


def test_right_answers_that_are_no_choices_are_refused(labeled, run):
    with pytest.raises(DataError, match="1 completions are not among the choices: 'symptoms'"):
        run(labeled, CertifySettings(choices=("cause", "treatment")))


def test_the_choices_are_those_of_the_right_answers_where_none_are_given(labeled, run):
    certificate = run(labeled, CertifySettings())
    assert certificate.answers.choices == ("cause", "symptoms", "treatment")
    assert certificate.answers.choices_from == "labels"


def test_more_rows_than_there_are_cannot_be_drawn(questions, run):
    with pytest.raises(DataError, match="has 30 rows, fewer than the sample of 31"):
        run(questions, replace(BY_CHOICE, sample=31))


def test_an_adapter_that_does_not_say_how_it_is_asked_needs_a_prompt(story, questions, tmp_path):
    shutil.copytree(story.patch, tmp_path / "adapter")
    (tmp_path / "adapter" / "patch.json").unlink()
    bare = load_patch(tmp_path / "adapter")
    asked = {**story.models(), "data": questions, "out": tmp_path / "certificate", "device": "cpu"}
    with pytest.raises(DataError, match="has no recorded prompt template.* Pass --prompt"):
        certify(bare, settings=BY_CHOICE, **asked)
    certificate = certify(bare, settings=replace(BY_CHOICE, prompt=PROMPT), **asked)
    assert certificate.inputs.completion is None


def test_one_ported_model_is_asked_for(story, questions, run):
    for given in ({"ported": None}, {"evolved": None}, {"merged": open_checkpoint(story.merged)}):
        with pytest.raises(PortLLMError, match="either the evolved model and the ported patch, or a merged model"):
            run(questions, **given)


def test_tokens_of_other_tokenizers_are_not_compared(story, questions, run, tmp_path):
    folder = shutil.copytree(story.evolved, tmp_path / "evolved")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(PlanRefusedError, match="different tokenizers"):
        run(questions, CertifySettings(kind="free"), evolved=open_checkpoint(folder))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"confidence": 1.0}, "the confidence is 1.0"),
        ({"confidence": 95.0}, "the confidence is 95.0"),
        ({"wanted": 0.0}, "the bound is 0.0"),
        ({"kind": "free", "wanted": 0.1}, "a bound is not available for free text"),
    ],
)
def test_settings_that_claim_what_cannot_be_are_refused(wrong, said):
    with pytest.raises(PortLLMError, match=said):
        CertifySettings(**wrong)
