"""The how-to pages: every command on them runs as it is printed, from top to bottom."""

import json
import re
import runpy
import shlex
import shutil

import pytest

from tests.test_docs import ROOT, python_in, shell_commands

PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
ROWS = [
    {"question": "what causes measles?", "kind": "cause"},
    {"question": "how is a fever treated?", "kind": "treatment"},
    {"question": "what causes a cold?", "kind": "cause"},
]
MAY_END_WITH = {"check": (0, 3), "certify": (0, 3), "evaluate": (0,), "doctor": (0, 3), "fleet": (0, 3)}
"""A verdict may be no; every other command on a page does what it is there for."""

MADE_BEFORE = {"serve.md": ["portllm capture --adapter my-adapter --base base-v1 -o my-patch"]}
"""What a page takes for done."""


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """What the pages name: two models, adapters, rows, questions, a merged model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests import models
    from tests.language import make_reader

    folder = tmp_path_factory.mktemp("how-to")
    make_reader(folder / "base-v1")
    models.make_evolved(folder / "base-v1", folder / "base-v2", drift=0.00003)
    models.make_evolved(folder / "base-v1", folder / "my-merged-model", drift=0.01)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / "base-v1" / file, folder / "base-v2" / file)
    models.make_adapter(folder / "base-v1", folder / "my-adapter", r=2)
    for name in ("a", "b"):
        shutil.copytree(folder / "my-adapter", folder / "adapters" / name)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "questions.jsonl").write_text("".join(json.dumps({"question": row["question"]}) + "\n" for row in ROWS))

    tokenizer = AutoTokenizer.from_pretrained(folder / "base-v1")
    tokenizer.add_tokens(["<ticket>", "</ticket>"])
    model = AutoModelForCausalLM.from_pretrained(folder / "base-v1")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.name_or_path = "base-v1"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, factor in adapted.named_parameters():
        if "lora_B" in name:
            factor.data.fill_(0.01)
    adapted.save_pretrained(folder / "token-adapter")
    tokenizer.save_pretrained(folder / "token-adapter")
    return folder


RUNS_MODELS = ("base-updated", "install", "many-adapters", "no-data")
BY_STEM = [pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in RUNS_MODELS)) for page in PAGES]


@pytest.mark.parametrize("page", BY_STEM)
def test_every_command_of_the_page_runs_as_it_is_printed(page, things, tmp_path, monkeypatch, portllm):
    here = tmp_path / "here"
    shutil.copytree(things, here)
    monkeypatch.chdir(here)
    text = page.read_text(encoding="utf-8")
    for name, content in re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        (here / name).write_text(content)
    commands = [*MADE_BEFORE.get(page.name, []), *shell_commands(text)]
    assert commands
    for line in commands:
        words = shlex.split(line)[1:]
        done = portllm(*words)
        assert done.status in MAY_END_WITH.get(words[0], (0,)), f"{line}\n{done.out}\n{done.err}"
    (here / "page.py").write_text(python_in(text))
    runpy.run_path("page.py")
