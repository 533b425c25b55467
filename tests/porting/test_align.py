"""An aligned port from end to end: what PEFT makes of the ported folder, and what it says of itself."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from portllm.checkpoint.open import open_checkpoint
from portllm.errors import DataError, PlanRefusedError
from portllm.methods import align as method
from portllm.methods.align import WRITTEN
from portllm.methods.choice import clustered
from portllm.patch.adapter_folder import load_patch
from portllm.porting.domain import Domain
from portllm.porting.drawn import Drawn
from portllm.porting.port import port
from portllm.porting.prompts import split
from portllm.running.examples import Example
from portllm.study.parts.control import TwinSettings, make_control
from portllm.study.parts.twin import Arrangement, Twin
from tests.language import make_reader
from tests.models import HIDDEN, load_tuned, make_adapter, make_evolved

WORDS = ("fever", "cold", "measles", "rest", "tea", "time", "clinic", "risk", "cause", "kind", "who", "what", "answer")
PROMPTS = tuple(f"{one} {other}" for one in WORDS for other in WORDS[:4])
"""Fifty-two of them."""

ANCHORS = tuple(f"{one} {other} {third}" for one, other, third in zip(WORDS, WORDS[5:], WORDS[3:], strict=False)) * 4

ANSWER_TOKENS = 2
RANK = 10

FLOAT32_NATS = 1e-4
"""Of a divergence of some hundredths, from logits of size 1 in float32."""


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aligned")
    base = make_reader(folder / "base", dtype=torch.float32)
    evolved = make_evolved(base, folder / "evolved", drift=0.05)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, evolved / name)
    patch = make_adapter(base, folder / "patch", size=0.2, r=RANK)
    ported = align({"base": base, "evolved": evolved, "patch": patch}, folder / "ported")
    return {"base": base, "evolved": evolved, "patch": patch, "ported": ported, "folder": folder / "ported"}


def align(story, out, *, evolved="evolved", prompts=PROMPTS, most_nats=0.2, **how):
    """With a limit that the first refit keeps to."""
    how = {"device": "cpu", "answer_tokens": ANSWER_TOKENS, "anchors": ANCHORS, "most_nats": most_nats} | how
    domain = Domain(prompts=prompts, **how)
    return port(story["patch"], evolved=story[evolved], base=story["base"], method="align", out=out, domain=domain)


def step_of(patch):
    return patch.record.ports[-1]


def said(base, adapter, prompts, answers=None, *, most=ANSWER_TOKENS):
    """What PEFT says at each token of the answers, in float64; without answers, of its own, which come with it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_tuned(base, adapter, dtype=torch.float64)
    own, found = [], []
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt).input_ids
        logits = []
        for place in range(most if answers is None else len(answers[number])):
            with torch.no_grad():
                logits.append(model(torch.tensor([ids])).logits[0, -1])
            ids.append(int(logits[-1].argmax()) if answers is None else answers[number][place])
            if ids[-1] == tokenizer.eos_token_id:
                break
        own.append(ids[len(ids) - len(logits) :])
        found.append(torch.stack(logits))
    return own, found


def both_said(story, part, *, most=ANSWER_TOKENS):
    """What PEFT says of old specialist and ported patch on the prompts of a part, and their divergence on each."""
    prompts = [prompt for prompt, each in zip(PROMPTS, split(PROMPTS), strict=True) if each == part]
    answers, old = said(story["base"], story["patch"], prompts, most=most)
    _, new = said(story["evolved"], story["folder"], prompts, answers)
    nats = [
        (one.softmax(1) * (one.log_softmax(1) - two.log_softmax(1))).sum(1).mean()
        for one, two in zip(old, new, strict=True)
    ]
    return old, new, nats


def test_the_ported_folder_has_in_peft_the_divergence_and_the_agreement_that_its_record_says(story):
    old, new, nats = both_said(story, "report")
    agrees = [one.argmax(1).equal(two.argmax(1)) for one, two in zip(old, new, strict=True)]
    recorded = step_of(story["ported"]).evidence
    assert recorded["divergence"] == pytest.approx(float(torch.stack(nats).mean()), abs=FLOAT32_NATS)
    assert recorded["agreement"] == pytest.approx(sum(agrees) / len(agrees), abs=1e-5)
    assert recorded["agreement_low"] < recorded["agreement"] <= recorded["agreement_high"]


def test_of_written_answers_the_tokens_that_peft_finds_alike_are_counted_too(story, tmp_path):
    written = step_of(align(story, tmp_path / "out", answer_tokens=WRITTEN * 3)).evidence
    old, new, _ = both_said(story | {"folder": tmp_path / "out"}, "report", most=WRITTEN * 3)
    alike = torch.stack([(one.argmax(1) == two.argmax(1)).double().mean() for one, two in zip(old, new, strict=True)])
    assert 0 < alike.mean() < 1, "the case is too easy to tell"
    assert written["token_agreement"] == pytest.approx(float(alike.mean()), abs=1e-5)
    assert written["agreement"] == pytest.approx(float((alike == 1).double().mean()), abs=1e-5)
    low, high = clustered(alike, sum(map(len, old)))
    assert written["token_agreement_low"] == pytest.approx(low, abs=1e-5)
    assert written["token_agreement_high"] == pytest.approx(high, abs=1e-5)
    assert "token_agreement" not in step_of(story["ported"]).evidence


def test_general_text_costs_what_the_next_token_of_the_evolved_model_costs_in_peft(story):
    texts = ANCHORS[2::3]  # the last of three rows tells the price
    bare, added, ported = (
        at_every_place(story["evolved"], adapter, texts) for adapter in (None, story["patch"], story["folder"])
    )
    recorded = step_of(story["ported"]).evidence
    assert recorded["general_nats_rows"] == len(texts)
    for name, logits in (("", bare), ("_added", added), ("_ported", ported)):
        nats = [-(p.softmax(1) * q.log_softmax(1)).sum(1).mean() for p, q in zip(bare, logits, strict=True)]
        assert recorded[f"general_nats{name}"] == pytest.approx(float(torch.stack(nats).mean()), abs=FLOAT32_NATS)
    assert recorded["general_nats"] < recorded["general_nats_ported"]  # nothing costs less than what is expected


def at_every_place(model, adapter, texts):
    """Logits in PEFT before each token but the first, text by text, in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if adapter is None:
        run = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    else:
        run = load_tuned(model, adapter, dtype=torch.float64)
    with torch.no_grad():
        return [run(torch.tensor([tokenizer(text).input_ids])).logits[0, :-1] for text in texts]


def test_what_was_tried_is_in_the_record_and_the_one_taken_has_the_distance_that_peft_finds(story):
    _, _, nats = both_said(story, "choose")
    step = step_of(story["ported"])
    by_name = {each.name: each for each in step.tried}
    taken = by_name[step.method.removeprefix("align: ")]
    assert taken.mean == pytest.approx(float((torch.stack(nats) / 2).sqrt().mean()), rel=1e-3)
    best = min((each for each in step.tried if not each.is_too_dear), key=lambda each: each.mean)
    assert best.error == 0
    assert taken.mean <= best.mean + taken.error
    assert by_name["add"].general_nats == 0
    assert next(iter(by_name)) == "add"
    card = (story["folder"] / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` | {each.mean:.4f} |" in card for name, each in by_name.items())


def test_an_aligned_port_is_nearer_to_the_old_specialist_than_addition(story):
    step = step_of(story["ported"])
    assert step.method.startswith("align: refit")
    assert step.evidence["divergence"] < 0.9 * step.evidence["divergence_added"]


def test_without_drift_the_factors_stay_as_they_are_byte_for_byte(story, tmp_path):
    ported = align(story, tmp_path / "still", evolved="base")
    assert step_of(ported).method == "align"
    assert step_of(ported).evidence["agreement"] == 1.0
    before, after = (folder / "adapter_model.safetensors" for folder in (story["patch"], tmp_path / "still"))
    assert load_patch(before.parent).deltas.keys() == ported.deltas.keys()
    from safetensors.torch import load_file

    assert all(tensor.equal(load_file(after)[name]) for name, tensor in load_file(before).items())


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes(story, tmp_path):
    align(story, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (story["folder"] / name).read_bytes()


def test_prompts_are_split_in_three_by_their_texts_alone():
    parts = dict(zip(PROMPTS, split(PROMPTS), strict=True))
    turned = PROMPTS[::-1]
    assert dict(zip(turned, split(turned), strict=True)) == parts
    assert sorted(parts.values()).count("fit") == 26
    assert {part: list(parts.values()).count(part) for part in ("choose", "report")} == {"choose": 13, "report": 13}


def test_too_few_prompts_are_refused():
    with pytest.raises(DataError, match="3 different ones were given; expected at least"):
        Domain(prompts=["a", "b", "c", "c"])


def test_aligning_without_prompts_or_without_the_base_is_refused(story, tmp_path):
    with pytest.raises(PlanRefusedError, match="pass them with --text"):
        port(story["patch"], evolved=story["evolved"], base=story["base"], method="align", out=tmp_path / "out")
    with pytest.raises(PlanRefusedError, match="--base"):
        port(
            story["patch"],
            evolved=story["evolved"],
            method="align",
            out=tmp_path / "out",
            domain=Domain(prompts=PROMPTS),
        )


@pytest.mark.parametrize("moved", ["everything", "heads and units alone"])
def test_a_twin_that_computes_the_same_in_another_order_is_refused_and_not_ported_wrong(
    story, tmp_path, moved, monkeypatch
):
    if moved != "everything":
        still = Arrangement(torch.arange(HIDDEN), torch.ones(HIDDEN))
        monkeypatch.setattr(Twin, "residual", property(lambda _: still))
    make_control(open_checkpoint(story["base"]), TwinSettings(seed=1), tmp_path / "twin")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(story["base"] / name, tmp_path / "twin" / name)
    with pytest.raises(
        PlanRefusedError, match="patched modules, such as .*, have nothing in common with .*--method transport"
    ):
        align({**story, "twin": tmp_path / "twin"}, tmp_path / "out", evolved="twin")


@pytest.mark.parametrize("text", [None, '{"model": {"vocab": {"another": 0}}}'])
def test_models_without_a_common_tokenizer_are_refused_by_the_reason(text, story, tmp_path):
    evolved = shutil.copytree(story["evolved"], tmp_path / "evolved")
    (evolved / "tokenizer.json").unlink()
    if text is not None:
        (evolved / "tokenizer.json").write_text(text)
    reason = f"there is no 'tokenizer.json' in {evolved}, .*Copy the file" if text is None else "different tokenizers"
    with pytest.raises(PlanRefusedError, match=reason):
        align({**story, "evolved": evolved}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prompts_for_a_method_that_reads_none_are_refused(story, tmp_path):
    with pytest.raises(PlanRefusedError, match="method 'add' reads no prompts"):
        port(
            story["patch"],
            evolved=story["evolved"],
            base=story["base"],
            out=tmp_path / "out",
            domain=Domain(prompts=PROMPTS),
        )


def test_a_run_that_is_interrupted_goes_on_from_the_layer_it_had_reached_to_the_same_bytes(story, tmp_path):
    done = []

    def interrupt(label, n_done, n_all, unit):
        if label.startswith("align") and n_done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        align(story, tmp_path / "out", progress=interrupt)
    align(story, tmp_path / "out", progress=lambda label, n_done, n_all, unit: done.append((label, n_done)))
    assert done == [("align, refit 1 of up to 4", 2)]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (story["folder"] / name).read_bytes()
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["out", "README.md", "adapter_model.safetensors", "adapter_config.json", "patch.json"]
    )


@pytest.fixture
def second(monkeypatch):
    """The name of the second refit: all that is built on the first is taken to cost too much."""
    first, second, *_ = method.refits(RANK)
    find = method.beyond_addition

    def beyond(nats):
        return find(nats) | {name: torch.ones(2).double() for name in nats if name.startswith(first)}

    monkeypatch.setattr(method, "beyond_addition", beyond)
    return second


@pytest.mark.parametrize("most", [0.0, 0.27, 0.5])
def test_what_may_be_lost_on_general_text_is_for_the_user_to_say(story, tmp_path, monkeypatch, most):
    free, dear = torch.zeros(2).double(), torch.tensor([0.2, 0.3]).double()
    costs = {method.ADD: free}
    monkeypatch.setattr(method, "beyond_addition", lambda nats: {name: costs.get(name, dear) for name in nats})
    step = step_of(align(story, tmp_path / "out", most_nats=most))
    dearest = [each.general_nats + each.general_error for each in step.tried]
    assert dearest == pytest.approx([0.0 if each.name == method.ADD else 0.3 for each in step.tried])
    assert [each.is_too_dear for each in step.tried] == [cost > most for cost in dearest]
    assert (step.method == "align") == (most < 0.3)
    assert step.evidence["general_nats_limit"] == most


def test_where_the_first_refit_costs_too_much_the_next_is_what_it_is_alone(story, tmp_path, monkeypatch, second):
    climbed, alone = [], []
    ported = align(story, tmp_path / "climbed", progress=lambda label, *rest: climbed.append(label))
    assert step_of(ported).method.startswith(f"align: {second}")
    first, *_ = method.refits(RANK)
    dear = {each.name for each in step_of(ported).tried if each.is_too_dear}
    assert dear >= {each.name for each in step_of(ported).tried if each.name.startswith(first)} != set()
    assert step_of(ported).method.removeprefix("align: ") in {each.name for each in step_of(ported).tried} - dear
    refit = method.refits(RANK)[second]
    monkeypatch.setattr(method, "refits", lambda _: {second: refit})
    align(story, tmp_path / "alone", progress=lambda label, *rest: alone.append(label))
    whole, only = ([label for label in of if label.startswith("align")] for of in (climbed, alone))
    assert [*dict.fromkeys(whole)] == ["align, refit 1 of up to 4", "align, refit 2 of up to 4"]
    assert len(whole) == 2 * len(only)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "climbed" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("is_best", [True, False])
def test_where_the_best_of_a_refit_costs_too_much_the_next_is_tried_though_a_worse_one_could_be_taken(
    story, tmp_path, monkeypatch, is_best
):
    free = step_of(story["ported"])
    best = free.method.removeprefix("align: ")
    worst = max((each for each in free.tried if each.name != method.ADD), key=lambda each: each.mean).name
    dear = best if is_best else worst
    assert best != worst
    monkeypatch.setattr(
        method, "beyond_addition", lambda nats: {name: torch.full((2,), float(name == dear)).double() for name in nats}
    )
    step = step_of(align(story, tmp_path / "out"))
    _, second, *_ = method.refits(RANK)
    assert {each.name for each in step.tried if each.is_too_dear} == {dear}
    assert any(each.name.startswith(second) for each in step.tried) == is_best
    assert is_best or step.method == free.method


def test_corrections_of_addition_come_last_and_are_what_they_are_where_addition_is_tried_first(
    story, tmp_path, monkeypatch
):
    def beyond(nats):  # no refit can be taken
        return {name: torch.full((2,), float(name.startswith("refit"))).double() for name in nats}

    monkeypatch.setattr(method, "beyond_addition", beyond)
    last, first = (step_of(align(story, tmp_path / f"{wanted}", wanted=wanted)) for wanted in (None, 1.0))
    assert last.tried == first.tried
    assert last.evidence == first.evidence
    assert [each.name for each in last.tried[:4]] == ["add", "add + balance", "add + logits", "add + states"]


def test_where_a_refit_is_chosen_no_correction_of_addition_was_tried(story):
    added, *others = [each.name for each in step_of(story["ported"]).tried]
    assert added == method.ADD
    assert all(name.startswith("refit") for name in others)
    assert step_of(story["ported"]).method.startswith("align: refit")


@pytest.mark.slow
def test_a_run_that_is_interrupted_in_the_second_refit_comes_to_the_same_bytes(story, tmp_path, second):
    done = []

    def interrupt(label, n_done, n_all, unit):
        done.append(label)
        if len([each for each in done if each.startswith("align")]) == 3:
            raise KeyboardInterrupt

    align(story, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        align(story, tmp_path / "out", progress=interrupt)
    align(story, tmp_path / "out")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_run_that_is_interrupted_is_not_gone_on_with_from_other_prompts(story, tmp_path):
    done = []

    def interrupt(label, n_done, n_all, unit):
        done.append((label, n_done))
        if label.startswith("align") and n_done == 1:
            raise KeyboardInterrupt

    for prompts in (PROMPTS, PROMPTS[1:]):
        with pytest.raises(KeyboardInterrupt):
            align(story, tmp_path / "out", prompts=prompts, progress=interrupt)
    assert done.count(("align, refit 1 of up to 4", 1)) == 2


def drawn(count, *parts):
    return Drawn(count, tuple((part, is_field) for part, is_field in parts))


ASKED = (("Kind ", False), ("question", True), (" is ", False), ("question", True))


def test_prompts_that_the_old_specialist_draws_have_the_form_of_its_template(story, tmp_path):
    def interrupt(label, n_done, n_all, unit):
        if label.startswith("align"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        align(story, tmp_path / "out", prompts=drawn(16, *ASKED), progress=interrupt)
    texts = json.loads(next(tmp_path.rglob(".prompts.json")).read_text())
    assert len(set(texts)) == len(texts) == 16
    assert all(re.fullmatch(r"Kind (.+) is \1", text) for text in texts)


@pytest.mark.slow
def test_a_port_on_drawn_prompts_says_so_and_helps(story, tmp_path):
    step = step_of(align(story, tmp_path / "out", prompts=drawn(64, *ASKED)))
    assert step.evidence["prompts_drawn"] == 64
    assert step.evidence["divergence"] < step.evidence["divergence_added"]


def test_too_few_drawn_prompts_are_refused(story, tmp_path):
    with pytest.raises(DataError, match="1 different ones were drawn"):
        align(story, tmp_path / "out", prompts=drawn(20, ("always the same", False)))


def test_where_rows_have_answers_the_choice_is_by_loss_on_those_that_nothing_was_fitted_on(story, tmp_path):
    parts = split(PROMPTS)
    rows = [Example(prompt, "rest" if "tea" in prompt else "tea") for prompt in PROMPTS]
    recorded = step_of(align(story, tmp_path / "out", answered=rows)).evidence
    judges = [row for row, part in zip(rows, parts, strict=True) if part == "choose"]
    assert recorded["loss_rows"] == len(judges)
    old = losses(story["base"], story["patch"], judges)
    new = losses(story["evolved"], tmp_path / "out", judges)
    assert recorded["loss"] == pytest.approx(old, abs=FLOAT32_NATS)
    assert recorded["loss_ported"] == pytest.approx(new, abs=FLOAT32_NATS)
    assert recorded["loss_ported"] <= recorded["loss_added"]


def losses(base, adapter, rows):
    """Nats a token of completions with their end mark, by PEFT, in float64."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_tuned(base, adapter, dtype=torch.float64)
    found = []
    for row in rows:
        before = tokenizer(row.prompt).input_ids
        after = [*tokenizer(f" {row.completion}").input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        found.append(torch.nn.functional.cross_entropy(logits, torch.tensor(after)))
    return float(torch.stack(found).mean())


def test_too_few_rows_with_answers_that_are_left_to_choose_by_are_refused(story, tmp_path):
    rows = [Example(prompt, "tea") for prompt, part in zip(PROMPTS, split(PROMPTS), strict=True) if part != "choose"]
    with pytest.raises(DataError, match="0 are left to choose by, of 39"):
        align(story, tmp_path / "out", answered=rows)


def test_what_lies_on_disk_has_no_name_and_changes_nothing(story, tmp_path, monkeypatch):
    monkeypatch.setattr("portllm.running.spool.MAPPED_BYTES", 0)
    there, mapped = [], []

    def look(label, n_done, n_all, unit):
        there.extend(tmp_path.rglob(".spool-*"))
        maps = Path("/proc/self/maps")
        mapped.append(maps.exists() and ".spool-" in maps.read_text())

    align(story, tmp_path / "out", progress=look)
    assert not there
    assert any(mapped) is Path("/proc/self/maps").exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["out", "README.md", "adapter_model.safetensors", "adapter_config.json", "patch.json"]
    )
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (story["folder"] / name).read_bytes()
