"""The steps of a study: each once, after what it needs, and no more of them done than must be."""

from dataclasses import replace

import pytest

from portllm.study.definition.plan import Step, data_of, needed, settings_of, startable, steps_of
from portllm.study.definition.settings import Evolution, HarnessTask, Study, Text
from portllm.study.parts.check import CheckSettings
from portllm.training.evolve import EvolveSettings
from portllm.training.evolve_lora import LoraEvolveSettings

STUDY = Study(
    title="A study",
    base="base-v1",
    seeds=(0, 5),
    methods=("add",),
    tasks={"a": HarnessTask(name="a"), "b-c": HarnessTask(name="b")},
    evolutions={
        "chain": Evolution(text="t.jsonl", links=3, settings=LoraEvolveSettings(seed=7), new_text=Text(file="n.jsonl")),
        "old": Evolution(text="t.jsonl", settings=EvolveSettings(), new_text=Text(file="n.jsonl")),
    },
    old_text=Text(file="o.jsonl"),
)
STEPS = steps_of(STUDY)
BY_NAME = {step.name: step for step in STEPS}


def test_every_step_has_a_name_of_its_own_and_comes_after_what_it_needs():
    assert len(BY_NAME) == len(STEPS)
    seen = set()
    for step in STEPS:
        assert set(step.inputs) <= seen, step.name
        seen.add(step.name)


def test_every_evolved_model_has_every_step_of_every_task_and_seed():
    models, per_model = 4, 2 + 1 + 2 * (1 + 2 * 4)  # evolve and drift, old text, and per task
    texts = 1 + 2 + models  # the base reads old and both new texts
    assert len(STEPS) == texts + 2 * (1 + 2 * 2) + models * per_model


def test_a_study_that_is_stopped_has_whole_rows():
    whole = steps_of(replace(STUDY, tasks={"a": STUDY.tasks["a"]}, evolutions={"chain": STUDY.evolutions["chain"]}))
    of_first = {step.name for step in whole if step.task == "a" and step.model in ("base", "chain.1")}
    other = next(number for number, step in enumerate(STEPS) if step.task == "b-c")
    assert of_first <= {step.name for step in STEPS[:other]}


def test_each_link_follows_the_last_and_the_first_patch_is_ported_to_all():
    assert BY_NAME["evolve_chain.1"].inputs == ()
    assert BY_NAME["evolve_chain.3"].inputs == ("evolve_chain.2",)
    assert BY_NAME["port_chain.3_a_s5_add"].inputs == ("evolve_chain.3", "train_base_a_s5")
    assert BY_NAME["train_chain.3_a_s5"].inputs == ("evolve_chain.3",)


def test_rivals_that_do_not_measure_themselves_are_compared_on_the_prompts_that_the_others_read():
    methods = ("add", "align", "random", "random-align", "truncated", "distilled")
    task = HarnessTask(name="a", train_rows=8, port_rows=16)
    steps = steps_of(replace(STUDY, methods=methods, tasks={"a": task, "b-c": STUDY.tasks["b-c"]}))
    compared = [step for step in steps if step.kind == "compare"]
    assert {step.task for step in compared} == {"a"}
    assert compared[0].name == "compare_chain.1_a_s0"
    ports = tuple(f"port_chain.1_a_s0_{method}" for method in ("random", "truncated", "distilled"))
    assert compared[0].inputs == ("evolve_chain.1", "train_base_a_s0", *ports)
    assert data_of(compared[0]) == "port a"
    assert len(compared) == 4 * 2  # models and seeds


def test_other_seeds_are_retrained_on_every_evolved_model_and_change_no_other_step():
    more = [step for step in steps_of(replace(STUDY, retrain_seeds=(8,))) if step not in STEPS]
    models = ("chain.1", "chain.2", "chain.3", "old.1")
    assert [step.name for step in more] == [
        name
        for model in models
        for task in ("a", "b-c")
        for name in (f"train_{model}_{task}_s8", f"score_{model}_{task}_s8_retrained")
    ]
    assert (
        steps_of(replace(STUDY, seeds=(0, 5, 8)))[-1] == more[-1]
    )  # as a seed of the study later, it is the same step


def test_settings_hold_the_seed_and_the_link():
    assert settings_of(BY_NAME["train_base_a_s5"], STUDY)["seed"] == 5
    link = settings_of(BY_NAME["evolve_chain.3"], STUDY)
    assert (link["kind"], link["link"], link["links"], link["seed"], link["rank"]) == ("lora", 3, 3, 9, 64)
    other = replace(STUDY, patch=replace(STUDY.patch, rank=4))
    assert [name for name, step in BY_NAME.items() if settings_of(step, other) != settings_of(step, STUDY)] == [
        name for name in BY_NAME if name.startswith("train_")
    ]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("train_chain.1_b-c_s0", "train b-c"),
        ("score_base_a", "score a"),
        ("evolve_chain.2", "text chain"),
        ("read_base_old", "text old"),
        ("read_base_new.old", "text new.old"),
        ("drift_chain.1", None),
    ],
)
def test_a_step_reads_its_own_data(name, data):
    assert data_of(BY_NAME[name]) == data


def test_a_patch_is_checked_before_what_became_of_it_is_known_where_the_study_asks():
    study = replace(STUDY, check=CheckSettings(prompts=4))
    added = [step for step in steps_of(study) if step.name not in BY_NAME]
    assert {step.kind for step in added} == {"check"}
    assert len(added) == 4 * 2 * 2
    step = next(step for step in added if step.name == "check_chain.2_a_s5")
    assert step.inputs == ("evolve_chain.2", "train_base_a_s5")
    assert data_of(step) == "train a"
    assert settings_of(step, study)["prompts"] == 4
    assert all(settings_of(BY_NAME[name], study) == settings_of(BY_NAME[name], STUDY) for name in BY_NAME)


def test_outputs_that_are_gone_are_made_again_only_for_steps_to_do():
    train, port = Step("train", "base", task="a", seed=0), Step("port", "e.1", inputs=("evolve_e.1", "train_base_a_s0"))
    evolve, score = Step("evolve", "e.1"), Step("score", "e.1", inputs=("evolve_e.1", "port_e.1"))
    steps = (train, evolve, port, score)
    names = [step.name for step in steps]
    done, there = dict.fromkeys(names, True), dict.fromkeys(names, False)
    assert needed(steps, done, there) == ()
    assert needed(steps, {**done, "score_e.1": False}, there) == steps
    assert needed(steps, {**done, "score_e.1": False}, {**there, "port_e.1": True}) == (evolve, score)
    assert needed(steps, {**done, "train_base_a_s0": False}, there) == (train,)


def test_a_step_can_be_begun_when_no_step_that_is_left_makes_what_it_reads():
    evolve, drift = BY_NAME["evolve_chain.1"], BY_NAME["drift_chain.1"]
    assert startable((evolve, drift), ()) == (evolve,)
    assert startable((evolve, drift), (evolve,)) == ()
    assert startable((drift,), ()) == (drift,)


def test_what_a_running_step_reads_is_not_made_again_before_it_has_ended():
    evolve, drift = BY_NAME["evolve_chain.1"], BY_NAME["drift_chain.1"]
    assert startable((evolve, drift), (drift,)) == ()
