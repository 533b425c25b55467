"""Data in the shapes of TRL and OpenAI, from training to the certificate."""

import json
import shutil

import pytest

from portllm.running.chat_template import template_digest
from portllm.running.model import load_tokenizer
from tests.language import CHATML, make_reader
from tests.models import make_evolved

ASKED = [("what causes measles?", "cause"), ("how is it treated?", "treatment")] * 3


def messages(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chat_pair(question, answer):
    user, assistant = messages(question, answer)["messages"]
    return {"prompt": [user], "completion": [assistant]}


def pair(question, answer):
    return {"prompt": question, "completion": f" {answer}"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    evolved = make_evolved(make_reader(folder / "base", template=CHATML), folder / "evolved")
    load_tokenizer(folder / "base").save_pretrained(evolved)
    (evolved / "chat_template.jinja").write_text(CHATML)
    return folder


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        (messages, "messages"),
        (pair, "prompt-completion"),
        pytest.param(chat_pair, "messages", marks=pytest.mark.slow),
    ],
)
def test_a_patch_of_chat_data_is_trained_checked_evaluated_and_certified(portllm, world, tmp_path, row, shape):
    data = write(tmp_path / "train.jsonl", [row(*asked) for asked in ASKED])
    how = ("--device", "cpu", "--steps", "2", "--rank", "2")
    trained = portllm("train", "--base", world / "base", "--data", data, *how, "-o", tmp_path / "patch")
    assert trained.status == 0, trained.err
    assert "6 rows, read as rows of '" in trained.err
    settings = json.loads((tmp_path / "patch" / "patch.json").read_text())["capture"]["settings"]
    assert settings["shape"] == shape
    assert settings.get("chat_template") == (template_digest(CHATML) if shape == "messages" else None)
    assert portllm("port", tmp_path / "patch", "--evolved", world / "evolved", "-o", tmp_path / "ported").status == 0
    models = ("--base", world / "base", "--evolved", world / "evolved")
    sides = (*models, "--patch", tmp_path / "patch", "--ported", tmp_path / "ported", "--device", "cpu")
    test = write(tmp_path / "test.jsonl", [row(*asked) for asked in ASKED[::-1]])
    evaluated = portllm("evaluate", *sides, "--data", test, "--json")
    assert evaluated.status == 0, evaluated.err
    assert json.loads(evaluated.out)["labels"] == ["cause", "treatment"]
    certified = portllm("certify", *sides, "--data", test, "-o", tmp_path / "certificate")
    assert certified.status == 0, certified.err
    checked = portllm("check", tmp_path / "patch", *models, "--text", test, "--device", "cpu")
    assert checked.status in (0, 3), checked.err
    same = portllm("evaluate", *sides, "--data", data)
    assert same.status == 1
    assert "/patch was trained on. Such rows say nothing about others" in same.err
    assert portllm("evaluate", *sides, "--data", data, "--allow-training-data").status == 0


def test_whole_texts_are_learned_and_cannot_be_evaluated(portllm, world, tmp_path):
    data = write(tmp_path / "train.jsonl", [{"text": " ".join(asked)} for asked in ASKED])
    how = ("--device", "cpu", "--steps", "2", "--rank", "2", "--quiet")
    trained = portllm("train", "--base", world / "base", "--data", data, *how, "-o", tmp_path / "patch")
    assert trained.status == 0, trained.err
    sides = ("--base", world / "base", "--evolved", world / "base", "--patch", tmp_path / "patch", "--device", "cpu")
    test = write(tmp_path / "test.jsonl", [{"text": "what helps?"}])
    evaluated = portllm("evaluate", *sides, "--ported", tmp_path / "patch", "--data", test)
    assert evaluated.status == 1
    assert "its rows hold no answer to compare with" in evaluated.err


def test_a_model_without_a_chat_template_is_refused_with_the_way_out(portllm, world, tmp_path):
    base = make_reader(tmp_path / "base")
    data = write(tmp_path / "train.jsonl", [messages(*asked) for asked in ASKED])
    trained = portllm("train", "--base", base, "--data", data, "-o", tmp_path / "patch")
    assert trained.status == 1
    assert "its tokenizer has no chat template" in trained.err
    assert "Copy 'chat_template.jinja' from the model's chat version" in trained.err


def test_rows_of_another_shape_than_the_patch_was_trained_on_are_refused(portllm, world, tmp_path):
    data = write(tmp_path / "train.jsonl", [messages(*asked) for asked in ASKED])
    how = ("--device", "cpu", "--steps", "1", "--rank", "2", "--quiet")
    assert portllm("train", "--base", world / "base", "--data", data, *how, "-o", tmp_path / "patch").status == 0
    test = write(tmp_path / "test.jsonl", [pair(*asked) for asked in ASKED])
    sides = ("--base", world / "base", "--evolved", world / "base", "--patch", tmp_path / "patch", "--device", "cpu")
    evaluated = portllm("evaluate", *sides, "--ported", tmp_path / "patch", "--data", test)
    assert evaluated.status == 1
    assert "/patch was trained on rows of 'messages'" in evaluated.err


def test_another_chat_template_than_that_of_the_training_is_refused_or_told(portllm, world, tmp_path):
    data = write(tmp_path / "train.jsonl", [messages(*asked) for asked in ASKED])
    how = ("--device", "cpu", "--steps", "1", "--rank", "2", "--quiet")
    assert portllm("train", "--base", world / "base", "--data", data, *how, "-o", tmp_path / "patch").status == 0
    test = write(tmp_path / "test.jsonl", [messages(*asked) for asked in ASKED[::-1]])
    other = shutil.copytree(world / "base", tmp_path / "other")
    (other / "chat_template.jinja").write_text(CHATML.replace("assistant", "helper"))
    both = ("--patch", tmp_path / "patch", "--ported", tmp_path / "patch", "--data", test, "--device", "cpu")
    told = portllm("evaluate", "--base", world / "base", "--evolved", other, *both)
    assert told.status == 0, told.err
    assert "other has another chat template than the patch was trained through" in told.err
    refused = portllm("evaluate", "--base", other, "--evolved", other, *both)
    assert refused.status == 1
    assert "was trained through another chat template than that of" in refused.err
