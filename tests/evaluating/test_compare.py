import json

import pytest
import torch

from portllm.errors import AdapterFormatError, CheckpointError, PortLLMError
from portllm.evaluating import compare as module
from portllm.evaluating.compare import Contestants, compare, score_all, set_side_by_side
from portllm.evaluating.metrics import accuracy_change
from portllm.evaluating.scoring import Scores, Task, score
from portllm.evaluating.tables import comparison_notes, comparison_rows
from portllm.running.encoding import Encoder
from portllm.running.examples import Example
from portllm.running.fused_lora import fuse
from portllm.running.model import attach_adapter, load_model, load_tokenizer
from portllm.training.evolve import EvolveSettings, evolve
from portllm.training.lora import train_lora
from portllm.training.settings import TrainSettings
from tests.language import TEXT

KINDS = {"what causes": "cause", "how is": "treatment", "who has": "symptoms"}
EXAMPLES = tuple(
    Example(prompt=f"{words} {thing}? Kind:", completion=kind)
    for thing in ("measles", "a cold", "a fever", "tea")
    for words, kind in KINDS.items()
)
TASK = Task(examples=EXAMPLES, batch_size=5)
RIVAL = "evolved + ported by align"
NAMES = [
    "base", "base + patch", "evolved", "evolved + ported", RIVAL, "evolved + ported, merged", "evolved + retrained",
]  # fmt: skip


@pytest.fixture(scope="module")
def contestants(reader, tmp_path_factory):
    """A base that learned the task, its evolved version, a patch for each, and a merged checkpoint."""
    where = tmp_path_factory.mktemp("contestants")
    training = TrainSettings(rank=4, alpha=8, learning_rate=5e-2, steps=40, batch_size=6, max_tokens=64)
    evolution = EvolveSettings(learning_rate=5e-3, steps=5, batch_size=2, block_tokens=32)
    train_lora(reader, EXAMPLES, training, where / "patch", device="cpu")
    evolve(reader, TEXT.strip().splitlines(), evolution, where / "evolved", device="cpu")
    train_lora(where / "evolved", EXAMPLES, training, where / "retrained", device="cpu")
    model = load_model(where / "evolved", device=torch.device("cpu"), dtype=torch.float32)
    merged = attach_adapter(model, where / "patch", name="patch").merge_and_unload()
    merged.save_pretrained(where / "merged")
    load_tokenizer(reader).save_pretrained(where / "merged")
    return Contestants(
        base=reader,
        patch=where / "patch",
        evolved=where / "evolved",
        ported=where / "patch",
        rivals={RIVAL: where / "retrained"},
        retrained=where / "retrained",
        merged=where / "merged",
    )


@pytest.fixture(scope="module")
def comparison(contestants):
    return compare(contestants, TASK, device="cpu")


def test_the_rows_stand_in_the_order_of_the_story(comparison):
    assert [row.name for row in comparison.rows] == NAMES


@pytest.mark.parametrize(("asked", "found"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_all_models_compute_in_the_dtype_that_was_asked_for(contestants, monkeypatch, asked, found):
    monkeypatch.setattr("portllm.running.model.compute_dtype", lambda stored, device: torch.bfloat16)
    seen = []

    class Noting(type(TASK)):
        def score(self, model, encoder, *, device, tick):
            seen.append(next(model.parameters()).dtype)
            return super().score(model, encoder, device=device, tick=tick)

    task = Noting(examples=TASK.examples[:4], labels=TASK.labels)
    compare(contestants, task, device="cpu", dtype=asked)
    assert seen == [found] * len(NAMES)


def test_each_row_is_what_its_model_scores_alone(comparison, contestants):
    def alone(folder, adapter=None):
        device = torch.device("cpu")
        model = load_model(folder, device=device)
        if adapter is not None:
            model = fuse(attach_adapter(model, adapter, name="alone"))
        return score(model, Encoder(load_tokenizer(folder)), TASK, device=device)

    expected = {
        "base": alone(contestants.base),
        "base + patch": alone(contestants.base, contestants.patch),
        "evolved": alone(contestants.evolved),
        "evolved + ported": alone(contestants.evolved, contestants.ported),
        RIVAL: alone(contestants.evolved, contestants.rivals[RIVAL]),
        "evolved + ported, merged": alone(contestants.merged),
        "evolved + retrained": alone(contestants.evolved, contestants.retrained),
    }
    for name, scores in expected.items():
        row = comparison.row(name)
        assert row.scores.answers == scores.answers, name
        assert row.scores.losses == scores.losses, name
        assert row.score.value == sum(scores.correct) / 12
        assert row.loss.value == pytest.approx(sum(scores.losses) / 12)


def test_answers_alike_are_those_of_base_and_patch_right_or_wrong():
    def scores(*answers):
        right = tuple(answer == example.completion for answer, example in zip(answers, EXAMPLES, strict=True))
        return Scores(answers=answers, correct=right, losses=(1.0,) * 12, n_cut_rows=0, seconds=0.0)

    said = ("cause", "treatment", "cause") * 4  # the last of three is wrong, and said again
    found = {"base": scores(*["cause"] * 12), "base + patch": scores(*said), "evolved": scores(*["cause"] * 12)}
    comparison = set_side_by_side(found | {"evolved + ported": scores("symptoms", *said[1:])}, TASK)
    assert [row.agreement and row.agreement.value for row in comparison.rows] == [None, None, 8 / 12, 11 / 12]
    header, *rows = comparison_rows(comparison)
    alike = [row[header.index("same answer")] for row in rows]
    assert alike == ["", "", "66.7 % (39.1 to 86.2)", "91.7 % (64.6 to 98.5)"]
    assert comparison.to_json()["rows"][3]["agreement"]["value"] == 11 / 12


def test_texts_are_told_by_their_length_and_labels_are_not(comparison):
    task = Task(examples=EXAMPLES, kind="text")
    found = {
        name: Scores(answers=answers, correct=(False,) * 12, losses=(1.0,) * 12, n_cut_rows=0, seconds=0.0)
        for name, answers in {"base": ("",) * 12, "base + patch": ("one", "one and two") * 6}.items()
    }
    texts = set_side_by_side(found, task)
    header, *rows = comparison_rows(texts)
    assert [row[header.index("words")] for row in rows] == ["0.0", "2.0"]
    assert "words: per answer, on average; correct answers have 1.0." in comparison_notes(texts)
    assert [row["words"] for row in texts.to_json()["rows"]] == [0.0, 2.0]
    assert "words" not in comparison_rows(comparison)[0]
    assert not any("words" in row for row in comparison.to_json()["rows"])


def test_base_and_evolved_are_loaded_once_whatever_their_adapters(contestants, monkeypatch):
    loaded = []

    def counting(folder, **how):
        loaded.append(folder)
        return load_model(folder, **how)

    monkeypatch.setattr(module, "load_model", counting)
    score_all(contestants, TASK, device="cpu")
    assert loaded == [contestants.base, contestants.evolved, contestants.merged]


def test_the_training_worked_and_the_ported_patch_keeps_much_of_it(comparison):
    """Guards the other tests: where all rows of the table were alike, they would show nothing."""
    loss = {row.name: row.loss.value for row in comparison.rows}
    assert loss["base + patch"] < loss["base"] - 1
    assert loss["evolved + retrained"] < loss["evolved"] - 1
    assert comparison.row("evolved + ported").loss_retention.value > 0.2
    assert comparison.row(RIVAL).loss.value != comparison.row("evolved + ported").loss.value


def test_the_merged_model_answers_like_the_ported_one(comparison):
    ported, merged = comparison.row("evolved + ported"), comparison.row("evolved + ported, merged")
    # The unmerged model computes in bfloat16, the merged one here in float32.
    assert merged.loss.value == pytest.approx(ported.loss.value, abs=0.1)


def test_only_what_is_given_is_run(contestants):
    comparison = compare(Contestants(base=contestants.base, patch=contestants.patch), TASK, device="cpu")
    assert [row.name for row in comparison.rows] == ["base", "base + patch"]
    assert all(row.flips is None and row.score_retention is None for row in comparison.rows)


def test_progress_counts_the_rows_of_all_models(contestants):
    told = []
    given = Contestants(base=contestants.base, patch=contestants.patch)
    compare(given, TASK, device="cpu", progress=lambda *what: told.append(what))
    assert told == [
        *(("evaluate: base", done, 24, "rows") for done in (0, 5, 10, 12)),
        *(("evaluate: base + patch", done, 24, "rows") for done in (12, 17, 22, 24)),
    ]


def scores(correct, losses):
    answers = tuple("right" if row else "wrong" for row in correct)
    return Scores(answers=answers, correct=tuple(correct), losses=tuple(losses), n_cut_rows=0, seconds=1.0)


def by_hand(**changed):
    rows = {
        "base": scores([False] * 8, [9.0] * 8),
        "base + patch": scores([True] * 7 + [False], [1.0] * 8),
        "evolved": scores([False] * 8, [5.0] * 8),
        "evolved + ported": scores([True] * 5 + [False] * 2 + [True], [2.0] * 8),
        "evolved + retrained": scores([True] * 8, [1.0] * 8),
    }
    return set_side_by_side({name: row for name, row in (rows | changed).items() if row}, TASK)


def test_retention_flips_and_change_by_hand():
    row = by_hand().row("evolved + ported")
    assert row.score_retention.value == pytest.approx(6 / 8)
    assert row.loss_retention.value == pytest.approx(3 / 4)
    assert (row.flips.negative, row.flips.positive) == ((5, 6), (7,))
    assert row.score_change.value == pytest.approx(-1 / 8)


def test_retention_is_said_of_the_ported_patch_alone():
    assert [row.name for row in by_hand().rows if row.score_retention or row.loss_retention] == ["evolved + ported"]


def test_another_port_is_measured_as_the_first_is_and_against_it_row_by_row():
    rival = scores([True] * 7 + [False], [1.5] * 8)
    first, row = map(by_hand(**{RIVAL: rival}).row, ("evolved + ported", RIVAL))
    assert (row.flips.negative, row.score_retention.value, row.loss_retention.value) == ((), 7 / 8, 7 / 8)
    assert (row.port_change, first.port_change) == (accuracy_change(rival.correct, first.scores.correct), None)
    assert row.port_change.value == pytest.approx(1 / 8)


def test_without_a_retrained_patch_retention_says_so():
    row = by_hand(**{"evolved + retrained": None}).row("evolved + ported")
    assert row.loss_retention.value is None
    assert row.loss_retention.reason == "no retrained patch was given"


def test_flips_are_counted_against_the_patched_base_and_not_where_it_was_not_run():
    assert [row.name for row in by_hand().rows if row.flips] == ["evolved", "evolved + ported", "evolved + retrained"]
    assert not any(row.flips or row.score_change for row in by_hand(**{"base + patch": None}).rows)


def test_the_rows_that_turned_wrong_are_told_with_both_answers():
    found = by_hand().turned_wrong("evolved + ported")
    assert [row.row for row in found] == [6, 7]  # of the file, whose first row is row 1
    assert (found[0].prompt, found[0].right) == (EXAMPLES[5].prompt, EXAMPLES[5].completion)
    assert (found[0].before, found[0].after) == ("right", "wrong")
    assert by_hand(**{"base + patch": None}).turned_wrong("evolved + ported") == ()
    assert by_hand().turned_wrong("evolved + ported, merged") == ()


def test_json_has_the_texts_of_what_a_port_turned_wrong_and_of_no_other_model():
    rows = {row["name"]: row for row in by_hand().to_json()["rows"]}
    assert [row["row"] for row in rows["evolved + ported"]["turned_wrong"]] == [6, 7]
    assert [name for name, row in rows.items() if "turned_wrong" in row] == ["evolved + ported"]
    rivals = by_hand(**{RIVAL: scores([False] * 8, [2.0] * 8)}).to_json()["rows"]
    assert [row["name"] for row in rivals if row.get("turned_wrong")] == ["evolved + ported", RIVAL]


def test_a_comparison_goes_into_json_as_it_is(comparison):
    told = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert [row["name"] for row in told["rows"]] == NAMES
    assert told["labels"] == ["cause", "symptoms", "treatment"]
    assert told["rows"][4]["flips"]["n_rows"] == told["n_rows"] == 12


def test_the_evolved_models_parts_without_it_are_refused(contestants):
    with pytest.raises(PortLLMError, match="ported and merged given without the evolved model"):
        Contestants(base=contestants.base, ported=contestants.patch, merged=contestants.merged)


def test_folders_that_are_no_model_or_no_adapter_are_told(contestants, tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        compare(Contestants(base=tmp_path / "missing"), TASK, device="cpu")
    with pytest.raises(AdapterFormatError, match=r"has no adapter_config\.json"):
        compare(Contestants(base=contestants.base, patch=tmp_path), TASK, device="cpu")
