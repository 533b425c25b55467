"""Scores against the harness's own evaluation of the same model, and against the program's own scorer."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")

from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

from portllm.errors import DataError
from portllm.evaluating.harness.scoring import score_task
from portllm.evaluating.harness.task import HarnessTask
from portllm.evaluating.scoring import Task, label_log_probs, score
from portllm.running.encoding import Encoder
from portllm.running.model import load_model, load_tokenizer, quiet
from tests.evaluating.harness.conftest import ROWS

CPU = torch.device("cpu")

F32_TOLERANCE = 2e-5  # nats: the same float32 sums in another order, over rows of some dozen tokens

CHOICES = ("boolq", "sst2", "mrpc", "rte", "wnli", "winogrande")
WRITTEN = 8


@pytest.fixture(scope="module")
def tokenizer(reader):
    return load_tokenizer(reader)


@pytest.fixture(scope="module")
def model(reader):
    return load_model(reader, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def tasks(data):
    return {name: HarnessTask(name, data=data) for name in ROWS}


def harness_alone(model, tokenizer, task, **options):
    """What the harness's own evaluation makes of the model: its results and its samples by filter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **options)
        found = evaluator.evaluate(lm, {"tasks": {task.name: task.inner}}, bootstrap_iters=0)
    results = {name: value for name, value in found["results"][task.name].items() if isinstance(value, float)}
    return {name: value for name, value in results.items() if "stderr" not in name}, found["samples"][task.name]


def scored(model, tokenizer, task, **options):
    return score_task(model, tokenizer, task, task.scored_questions(), device=CPU, **options)


@pytest.mark.parametrize("name", CHOICES)
def test_answers_and_metrics_are_those_of_the_harnesss_own_evaluation(model, tokenizer, tasks, name):
    results, samples = harness_alone(model, tokenizer, tasks[name])
    ours = scored(model, tokenizer, tasks[name], batch_size=3)
    assert ours.metrics == results
    assert ours.correct == tuple(sample["acc"] == 1.0 for sample in samples)
    assert len(set(ours.correct)) == 2


def test_what_is_written_and_read_out_of_it_is_that_of_the_harnesss_own_evaluation(model, tokenizer, tasks):
    task = tasks["gsm8k"]
    task.inner.config.generation_kwargs["max_gen_toks"] = WRITTEN
    results, samples = harness_alone(model, tokenizer, task)
    del task.inner.config.generation_kwargs["max_gen_toks"]
    ours = scored(model, tokenizer, task, max_new_tokens=WRITTEN, batch_size=1)
    assert ours.metrics == results
    assert set(results) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    flexible = [sample for sample in samples if sample["filter"] == "flexible-extract"]
    assert ours.answers == tuple(sample["resps"][0][0] for sample in flexible)
    assert any(ours.answers)


def test_a_number_in_what_is_written_is_right_by_the_flexible_filter(model, tokenizer, tasks, monkeypatch):
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, disable_tqdm: ["so 2, or 4"] * len(requests))
    ours = scored(model, tokenizer, tasks["gsm8k"], max_new_tokens=WRITTEN)
    assert ours.correct == (False, False, True, False, False)
    assert ours.metrics == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 0.2}


@pytest.mark.parametrize("name", ["boolq", "sst2", "mrpc", "rte", "wnli"])
def test_our_own_scorer_agrees_row_by_row(model, tokenizer, tasks, name):
    questions = tasks[name].scored_questions()
    by_harness = scored(model, tokenizer, tasks[name])
    labels = tuple(continuation.strip() for _, continuation in questions[0].pairs)
    own = Task(examples=tuple(question.example for question in questions), labels=labels, max_tokens=600)
    by_us = score(model, Encoder(tokenizer), own, device=CPU)
    assert by_us.answers == by_harness.answers
    assert by_us.correct == by_harness.correct
    assert by_us.losses == pytest.approx(by_harness.losses, abs=F32_TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("name", [*CHOICES, "gsm8k"])
def test_our_log_probabilities_are_those_of_the_harness_choice_by_choice(model, tokenizer, tasks, name):
    encoder = Encoder(tokenizer)
    questions = tasks[name].scored_questions()
    by_harness = scored(model, tokenizer, tasks[name], max_new_tokens=WRITTEN)
    losses = []
    for question in questions:
        rows = [encoder.encode(context, continuation.strip()) for context, continuation in question.pairs]
        sums = label_log_probs(model, [row.prompt for row in rows], [[row.completion] for row in rows], device=CPU)
        losses.append(-float(sums[question.right, 0]) / len(rows[question.right].completion))
        if name in CHOICES:
            assert (int(sums[:, 0].argmax()) == question.right) == by_harness.correct[len(losses) - 1]
    assert by_harness.losses == pytest.approx(losses, abs=F32_TOLERANCE)


def test_a_bound_on_tokens_cuts_as_the_harness_does(model, tokenizer, tasks):
    results, samples = harness_alone(model, tokenizer, tasks["boolq"], max_length=40)
    ours = scored(model, tokenizer, tasks["boolq"], max_tokens=40)
    assert ours.metrics == results
    right = [sample["resps"][sample["target"]][0][0] for sample in samples]
    lengths = [len(tokenizer(" yes" if sample["target"] else " no")["input_ids"]) for sample in samples]
    expected = [-cost / length for cost, length in zip(right, lengths, strict=True)]
    assert ours.losses == pytest.approx(expected, abs=F32_TOLERANCE)
    assert ours.n_cut_rows == 2
    assert scored(model, tokenizer, tasks["boolq"]).n_cut_rows == 0


def test_an_answer_that_does_not_fit_is_refused(model, tokenizer, tasks):
    with pytest.raises(DataError, match="has 8 tokens; expected 1 to 5"):
        scored(model, tokenizer, tasks["winogrande"], max_tokens=5)
    with pytest.raises(DataError, match="no room is left for the prompt"):
        scored(model, tokenizer, tasks["gsm8k"], max_tokens=40, max_new_tokens=40)


@pytest.mark.parametrize("name", ["sst2", "winogrande", "gsm8k"])
def test_every_row_is_told_of_once(model, tokenizer, tasks, name):
    told = []
    scored(model, tokenizer, tasks[name], max_new_tokens=WRITTEN, batch_size=2, tick=told.append)
    assert sum(told) == len(ROWS[name])


def test_the_adapter_that_is_switched_on_counts_and_the_model_stays_as_it_was(reader, tokenizer, tasks):
    examples = tuple(question.example for question in tasks["sst2"].scored_questions())
    plain = load_model(reader, device=CPU, dtype=torch.float32)
    before = scored(plain, tokenizer, tasks["sst2"])
    torch.manual_seed(0)
    # With a head of its own: the harness's class would tie it to the embedding again, were it given the model.
    config = LoraConfig(
        r=2, lora_alpha=64, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    with quiet():
        patched = get_peft_model(plain, config).eval()
    head = plain.lm_head.modules_to_save["default"].weight
    head.data.mul_(0.5)
    found = scored(patched, tokenizer, tasks["sst2"])
    by_us = score(patched, Encoder(tokenizer), Task(examples=examples, labels=("negative", "positive")), device=CPU)
    assert found.losses == pytest.approx(by_us.losses, abs=F32_TOLERANCE)
    assert found.losses != pytest.approx(before.losses, abs=1e-2)
    assert plain.lm_head.modules_to_save["default"].weight is head
    with patched.disable_adapter():
        assert scored(patched, tokenizer, tasks["sst2"]).losses == pytest.approx(before.losses, abs=F32_TOLERANCE)
