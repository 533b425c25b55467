from types import SimpleNamespace

import pytest
import torch

from portllm.errors import DataError
from portllm.evaluating.scoring import Task, label_log_probs, score
from portllm.running.encoding import Encoder
from portllm.running.examples import Example
from portllm.running.model import load_model, load_tokenizer
from portllm.running.prefill import Prefill

CPU = torch.device("cpu")

F32_TOLERANCE = 2e-5  # nats: the same float32 sums in another order, over rows of some dozen tokens

LABELS = ("cause", "treatment", "symptoms", "risk of inherited fever", "tea")

EXAMPLES = tuple(
    Example(prompt=prompt, completion=completion)
    for prompt, completion in [
        ("what causes measles? Kind:", "cause"),
        ("how is a fever treated, and what helps against a cold? Kind:", "treatment"),
        ("fever", "symptoms"),
        ("is measles inherited? Kind:", "risk of inherited fever"),
        ("Kind:\n", "tea"),
        ("what are the symptoms of measles, and who is at risk? Answer:", "symptoms"),
    ]
)


@pytest.fixture(scope="module")
def encoder(reader):
    return Encoder(load_tokenizer(reader))


@pytest.fixture(scope="module", params=[512, 513], ids=["eager", "sdpa"])
def model(reader, request):
    return load_model(reader, device=CPU, dtype=torch.float32, longest=request.param)


def log_prob_alone(model, prompt, label):
    """The obvious way: the whole row alone, no cache, no padding, every position's logits."""
    ids = torch.tensor([prompt + label])
    log_probs = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
    return sum(float(log_probs[len(prompt) + index - 1, token]) for index, token in enumerate(label))


def naive_answers(model, encoder):
    sums = [
        [log_prob_alone(model, encoded.prompt, encoded.completion) for encoded in row] for row in encoded_rows(encoder)
    ]
    return sums, [LABELS[max(range(len(LABELS)), key=row.__getitem__)] for row in sums]


def encoded_rows(encoder):
    return [[encoder.encode(example.prompt, label) for label in LABELS] for example in EXAMPLES]


@torch.inference_mode()
@pytest.mark.parametrize("together", [[0], [2], [0, 1], [1, 2, 4], [0, 1, 2, 3, 4, 5], [5, 2, 2]])
def test_a_labels_log_probability_is_that_of_the_row_alone_whatever_the_batch(model, encoder, together):
    rows = [encoded_rows(encoder)[index] for index in together]
    lengths = {len(encoded.completion) for encoded in rows[0]}
    assert {1} < lengths  # labels of one token, and longer ones
    found = label_log_probs(
        model,
        [row[0].prompt for row in rows],
        [[encoded.completion for encoded in row] for row in rows],
        device=CPU,
    )
    for row, sums in zip(rows, found.tolist(), strict=True):
        expected = [log_prob_alone(model, encoded.prompt, encoded.completion) for encoded in row]
        assert sums == pytest.approx(expected, abs=F32_TOLERANCE)


@torch.inference_mode()
def test_of_labels_that_do_not_count_the_likeliest_is_found_and_the_others_are_bounded(model, encoder):
    rows = encoded_rows(encoder)
    prompts, labels = [row[0].prompt for row in rows], [[encoded.completion for encoded in row] for row in rows]
    whole = label_log_probs(model, prompts, labels, device=CPU)
    found = label_log_probs(model, prompts, labels, device=CPU, counted=[(3,), *[()] * (len(prompts) - 1)])
    assert torch.equal(found.argmax(dim=1), whole.argmax(dim=1))
    assert (found >= whole - F32_TOLERANCE).all()
    assert found[0, 3] == pytest.approx(float(whole[0, 3]), abs=F32_TOLERANCE)
    assert (found > whole + 1.0).any()  # something was spared


@torch.inference_mode()
def test_labels_of_many_tokens_are_read_on_only_where_they_can_still_win(model, encoder, monkeypatch):
    prompt = encoded_rows(encoder)[0][0].prompt
    sure = model.register_forward_hook(lambda _, __, output: setattr(output, "logits", 50 * output.logits))
    read, go_on = [], Prefill.go_on
    monkeypatch.setattr(Prefill, "go_on", lambda self, rows, texts: read.extend(texts) or go_on(self, rows, texts))
    try:
        written = list(prompt)
        for _ in range(3):
            written.append(int(model(input_ids=torch.tensor([written])).logits[0, -1].argmax()))
        unlikely = model(input_ids=torch.tensor([prompt])).logits[0, -1].argsort()[:5].tolist()
        likely = tuple(written[-3:])
        labels = [*((token, token, token) for token in unlikely), likely]
        found = label_log_probs(model, [prompt], [labels], device=CPU, counted=[()])
    finally:
        sure.remove()
    assert int(found.argmax()) == 5
    assert read == [likely]


@torch.inference_mode()
@pytest.mark.parametrize(("continuations", "logits"), [(4, 1 << 27), (64, 2000), (64, 1)])
def test_labels_that_are_scored_in_several_passes_are_scored_alike_and_no_pass_is_too_large(
    model, encoder, monkeypatch, continuations, logits
):
    rows = encoded_rows(encoder)
    given = [row[0].prompt for row in rows], [[encoded.completion for encoded in row] for row in rows]
    whole = label_log_probs(model, *given, device=CPU)
    monkeypatch.setattr("portllm.running.prefill.CONTINUATIONS", continuations)
    monkeypatch.setattr("portllm.running.encoding.LOGITS", logits)
    passes = []
    watched = model.register_forward_hook(lambda _, __, output: passes.append(output.logits.shape))
    try:
        found = label_log_probs(model, *given, device=CPU)
    finally:
        watched.remove()
    assert torch.allclose(found, whole, atol=F32_TOLERANCE, rtol=0)
    assert len(passes) > 3
    assert all(shape[0] == 1 or (shape[0] <= continuations and shape.numel() <= logits) for shape in passes[1:])


@torch.inference_mode()
def test_answers_and_losses_are_those_of_the_naive_way(model, encoder):
    sums, answers = naive_answers(model, encoder)
    scores = score(model, encoder, Task(examples=EXAMPLES, labels=LABELS, batch_size=4), device=CPU)
    assert scores.answers == tuple(answers)
    assert scores.correct == tuple(
        answer == example.completion for answer, example in zip(answers, EXAMPLES, strict=True)
    )
    for loss, row, encoded, example in zip(scores.losses, sums, encoded_rows(encoder), EXAMPLES, strict=True):
        right = LABELS.index(example.completion)
        assert loss == pytest.approx(-row[right] / len(encoded[right].completion), abs=F32_TOLERANCE)


def test_scores_do_not_depend_on_the_size_of_batches_or_the_order_of_rows(model, encoder):
    task = Task(examples=EXAMPLES, labels=LABELS, batch_size=6)
    together = score(model, encoder, task, device=CPU)
    alone = score(model, encoder, Task(examples=EXAMPLES, labels=LABELS, batch_size=1), device=CPU)
    turned = score(model, encoder, Task(examples=EXAMPLES[::-1], labels=LABELS), device=CPU)
    assert together.answers == alone.answers == turned.answers[::-1]
    assert together.losses == pytest.approx(alone.losses, abs=F32_TOLERANCE)
    assert together.losses == pytest.approx(turned.losses[::-1], abs=F32_TOLERANCE)


def test_every_row_is_told_of_once(model, encoder):
    told = []
    score(model, encoder, Task(examples=EXAMPLES, labels=LABELS, batch_size=4), device=CPU, tick=told.append)
    assert told == [4, 2]


def test_a_long_prompt_loses_its_beginning_alike_for_all_labels(model, encoder):
    rows = encoded_rows(encoder)
    longest = max(len(encoded.completion) for row in rows for encoded in row)
    limit = longest + 1 + 5
    scores = score(model, encoder, Task(examples=EXAMPLES, labels=LABELS, max_tokens=limit), device=CPU)
    assert scores.n_cut_rows == sum(len(row[0].prompt) > 5 for row in rows) > 0
    with torch.inference_mode():
        expected = log_prob_alone(model, rows[1][0].prompt[-5:], rows[1][1].completion)
    assert scores.losses[1] == pytest.approx(-expected / len(rows[1][1].completion), abs=F32_TOLERANCE)


def written_alone(model, encoder, prompt, *, max_new_tokens):
    """The obvious way: the whole text again for every token."""
    ids = list(encoder.encode_text(prompt))
    start = len(ids)
    while len(ids) - start < max_new_tokens:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == encoder.eos:
            break
    return encoder.decode(ids[start:])


def test_written_answers_are_those_of_the_naive_way(model, encoder):
    with torch.inference_mode():
        texts = [written_alone(model, encoder, example.prompt, max_new_tokens=9) for example in EXAMPLES]
    expected = [text.strip().splitlines()[0].strip() if text.strip() else "" for text in texts]
    scores = score(model, encoder, Task(examples=EXAMPLES, kind="text", max_new_tokens=9, batch_size=4), device=CPU)
    assert list(scores.answers) == expected
    assert len(set(expected)) > 1


def test_what_a_model_writes_is_right_where_it_is_the_completion(model, encoder):
    first = score(model, encoder, Task(examples=EXAMPLES, kind="text", max_new_tokens=5), device=CPU)
    target = next(index for index, answer in enumerate(first.answers) if answer)
    examples = [
        Example(prompt=example.prompt, completion=first.answers[index] if index == target else "not this")
        for index, example in enumerate(EXAMPLES)
    ]
    again = score(model, encoder, Task(examples=tuple(examples), kind="text", max_new_tokens=5), device=CPU)
    assert [index for index, right in enumerate(again.correct) if right] == [target]


def test_the_loss_of_a_written_answer_is_that_of_the_completion(model, encoder):
    by_label = score(model, encoder, Task(examples=EXAMPLES, labels=LABELS), device=CPU)
    by_text = score(model, encoder, Task(examples=EXAMPLES, kind="text", max_new_tokens=1), device=CPU)
    assert by_text.losses == pytest.approx(by_label.losses, abs=F32_TOLERANCE)


@pytest.mark.parametrize(("completion", "answer"), [("rest", "rest"), ("rest \ntea", "rest \ntea")])
def test_an_answer_is_read_to_the_end_of_its_line_unless_one_of_several_is_asked_for(
    model, encoder, monkeypatch, completion, answer
):
    written = [*encoder.tokenizer("\n rest \ntea")["input_ids"], encoder.eos]

    def parrot(input_ids, past_key_values=None, logits_to_keep=0, **_):
        cache = past_key_values or SimpleNamespace(n_said=0, reorder_cache=lambda _: None)
        logits = torch.zeros(*input_ids.shape, len(encoder.tokenizer))
        logits[:, -1, written[min(cache.n_said, len(written) - 1)]] = 1.0
        cache.n_said += 1
        return SimpleNamespace(logits=logits[:, -logits_to_keep:], past_key_values=cache)

    monkeypatch.setattr(model, "forward", parrot)
    rows = (Example(prompt="Kind:", completion=completion),)
    assert score(model, encoder, Task(examples=rows, kind="text"), device=CPU).answers == (answer,)


def test_without_labels_the_completions_that_occur_are_the_labels():
    assert Task(examples=EXAMPLES).labels == ("cause", "risk of inherited fever", "symptoms", "tea", "treatment")


def test_a_task_without_rows_or_with_one_label_is_refused():
    with pytest.raises(DataError, match="no examples"):
        Task(examples=())
    with pytest.raises(DataError, match="expected two or more"):
        Task(examples=EXAMPLES[:1])
    with pytest.raises(DataError, match="expected two or more, each once"):
        Task(examples=EXAMPLES[:1], labels=("cause", "cause"))


def test_completions_that_are_no_label_are_all_told():
    with pytest.raises(
        DataError, match=r"these answers are not among the labels \('cause', .*: 'risk of inherited fever', 'tea'"
    ):
        Task(examples=EXAMPLES, labels=("cause", "treatment", "symptoms"))


def test_written_answers_need_no_labels():
    assert Task(examples=EXAMPLES[:1], kind="text").labels == ()
