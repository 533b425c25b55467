"""A study's file: what is right becomes values, what is wrong is named with its line, all at once."""

import pytest

from portllm.errors import StudyFileError
from portllm.study.definition.file import read_study
from portllm.study.definition.settings import HarnessTask, RowsTask, Text
from portllm.study.parts.check import CheckSettings
from portllm.study.parts.control import ReinitSettings, TwinSettings
from portllm.training.evolve import EvolveSettings
from portllm.training.evolve_lora import LoraEvolveSettings

WHOLE = """
title = "A study"
base = "base-v1"
seeds = [0, 3]

[patch]
rank = 4
learning_rate = 1

[tasks.kinds]
kind = "rows"
train = "rows.jsonl"
score = "held-out.jsonl"
prompt = "{text}"
completion = "kind"
labels = ["a", "b"]

[tasks.sst2]
kind = "harness"
name = "sst2"

[evolutions.lora-wiki]
kind = "lora"
text = "wiki.jsonl"
links = 3
rank = 16
target_modules = ["q_proj"]
new_text = { file = "wiki-held-out.jsonl", rows = 4 }

[evolutions.full-wiki]
kind = "full"
text = "wiki.jsonl"
template = "{title}: {text}"
steps = 7

[evolutions.other-order]
kind = "twin"
seed = 5

[evolutions.two-new-layers]
kind = "reinit"
layers = [3, 4]
"""


def read(tmp_path, text):
    file = tmp_path / "study.toml"
    file.write_text(text)
    return read_study(file)


def problems(tmp_path, text):
    with pytest.raises(StudyFileError) as caught:
        read(tmp_path, text)
    return str(caught.value).replace(f"'{tmp_path}/study.toml'", "FILE").splitlines()


def test_a_file_becomes_values(tmp_path):
    study = read(tmp_path, WHOLE)
    assert (study.title, study.base, study.seeds, study.methods) == ("A study", "base-v1", (0, 3), ("add",))
    assert (study.patch.rank, study.patch.learning_rate, study.patch.alpha) == (4, 1.0, 16)
    assert study.check is None
    assert study.tasks == {
        "kinds": RowsTask(
            train="rows.jsonl", score="held-out.jsonl", prompt="{text}", completion="kind", labels=("a", "b")
        ),
        "sst2": HarnessTask(name="sst2"),
    }
    lora, full = study.evolutions["lora-wiki"], study.evolutions["full-wiki"]
    assert (lora.kind, lora.links, lora.settings) == (
        "lora", 3, LoraEvolveSettings(rank=16, target_modules=("q_proj",)),
    )  # fmt: skip
    assert lora.new_text == Text(file="wiki-held-out.jsonl", rows=4)
    assert (full.kind, full.template, full.settings) == ("full", "{title}: {text}", EvolveSettings(steps=7))
    twin, new = study.evolutions["other-order"], study.evolutions["two-new-layers"]
    assert (twin.kind, twin.text, twin.settings) == ("twin", None, TwinSettings(seed=5))
    assert (new.kind, new.settings) == ("reinit", ReinitSettings(layers=(3, 4)))


def test_a_study_may_ask_for_checks(tmp_path):
    assert read(tmp_path, WHOLE + "[check]\n").check == CheckSettings()
    assert read(tmp_path, WHOLE + "[check]\nprompts = 8\nfull = true\n").check == CheckSettings(prompts=8, full=True)
    told = problems(tmp_path, WHOLE + "[check]\nprompts = 1\n")
    assert told == ["FILE, line 43, check: check settings: prompts is 1; expected 0, or 2 or more."]


def test_every_problem_is_named_with_its_line_and_key(tmp_path):
    text = (
        WHOLE.replace('base = "base-v1"\n', "")
        .replace("seeds = [0, 3]", "seeds = [0, 0]\nmethods = ['ad']")
        .replace("rank = 4", "rnk = 4")
        .replace("learning_rate = 1", 'learning_rate = "fast"')
        .replace('name = "sst2"', "")
        .replace("links = 3", "links = 0")
        .replace("rank = 16", "rank = 0")
        .replace("rows = 4", "row = 4")
        .replace('kind = "full"', 'kind = "whole"')
    )
    assert problems(tmp_path, text) == [
        "FILE, base: is required.",
        "FILE, line 3, seeds: is the list [0, 0]; expected a list, each an integer; one or more, each once.",
        "FILE, line 4, methods: unknown port method 'ad'; available: add, align, transport, random, random-align, "
        "truncated, distilled.",
        "FILE, line 7, patch.rnk: unknown key. Did you mean rank?",
        "FILE, line 8, patch.learning_rate: is 'fast'; expected a number.",
        "FILE, line 18, tasks.sst2.name: is required.",
        "FILE, line 22, evolutions.lora-wiki: evolution settings: rank is 0; expected 1 or more.",
        "FILE, line 22, evolutions.lora-wiki: evolution: links is 0; expected 1 or more.",
        "FILE, line 28, evolutions.lora-wiki.new_text.row: unknown key. Did you mean rows?",
        "FILE, line 31, evolutions.full-wiki.kind: is 'whole'; expected 'full' or 'lora' or 'twin' or 'reinit'.",
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("seeds = [0, 3]", "seeds = [0, 0]"), "seeds: is the list [0, 0]; expected a list, each an integer"),
        (("seeds = [0, 3]", "seeds = []"), "line 4, seeds: is the list []; expected a list, each an integer"),
        (("seeds = [0, 3]", "seeds = [true]"), "seeds: is the list [True]; expected a list, each an integer"),
        (("seeds = [0, 3]", "methods = ['ad']"), "line 4, methods: unknown port method 'ad'"),
        (("seeds = [0, 3]", "methods = ['align']"), "line 4, methods: method 'align' reads prompts; pass 'port_rows'"),
        (("seeds = [0, 3]", "methods = ['align@64']"), "reads prompts; pass 'port_rows', 64 or more, in [tasks.kinds]"),
        (("seeds = [0, 3]", "methods = ['align@drawn-64']"), "through a template, and there is none in [tasks.sst2]"),
        (("seeds = [0, 3]", "methods = ['add@64']"), "methods: 'add@64': 'add' does not port on prompts; write 'add'"),
        (("seeds = [0, 3]", "methods = ['align@0']"), "line 4, methods: unknown port method 'align@0'"),
        (("seeds = [0, 3]", "seeds = [0, 3]\nretrain_seeds = [3, 4]"), "line 5, retrain_seeds: seed 3 is"),
        (("seeds = [0, 3]", "retrain_seeds = [0]"), "line 4, retrain_seeds: seed 0 is one of 'seeds'"),
        (("seeds = [0, 3]", "compare = 'x7b'"), "line 4, compare: is 'x7b', which is not a published table. "),
        (("seeds = [0, 3]", "compare = ['paper-mistral-7b', 'x7b']"), "line 4, compare: is 'x7b', which is not a"),
        (("rank = 4", "rank = true"), "line 7, patch.rank: is true; expected an integer"),
        (("rank = 4", "seed = 4"), "line 7, patch.seed: unknown key; patches are trained with each of 'seeds'"),
        (("[tasks.kinds]", "[tasks.Kinds]"), "line 10, tasks.Kinds: is not a valid name; expected lowercase"),
        (('prompt = "{text}"', 'prompt = "text"'), "tasks.kinds: template 'text': names no field"),
        (("steps = 7", "rank = 7"), "line 34, evolutions.full-wiki.rank: unknown key."),
        (('kind = "full"\ntext = "wiki.jsonl"', 'kind = "full"'), "text is None; expected a file, which this"),
        (("steps = 7", "steps = 7\n[evolutions.t]\nkind = 'twin'\ntext = 'a'"), "evolutions.t: evolution: text is a"),
        (("steps = 7", "steps = 7\n[evolutions.t]\nkind = 'reinit'\nsteps = 2"), "line 37, evolutions.t.steps: unk"),
        (("steps = 7", "steps = 7\n[old_text]\nfile = 3"), "line 36, old_text.file: is 3; expected a text"),
    ],
)  # fmt: skip
def test_a_problem_is_named(tmp_path, change, problem):
    told = problems(tmp_path, WHOLE.replace(*change))
    assert len(told) == 1
    assert problem in told[0]


def test_a_study_without_tasks_or_evolutions_is_none(tmp_path):
    told = problems(tmp_path, "title = 'A'\nbase = 'b'\n[evolutions]\n")
    assert told == [
        "FILE, tasks: is required: one or more tables [tasks.NAME].",
        "FILE, line 3, evolutions: is required: one or more tables [evolutions.NAME].",
    ]


def test_what_is_no_toml_or_no_file_is_refused(tmp_path):
    assert "is not valid TOML" in problems(tmp_path, "title = ")[0]
    with pytest.raises(StudyFileError, match="cannot be read"):
        read_study(tmp_path / "none.toml")
