import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import OutputError, OutputExistsError, PlanRefusedError
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from portllm.running.data import read_data
from portllm.running.model import load_tokenizer
from portllm.training.lessons import Teacher, read_questions
from portllm.training.settings import TrainSettings
from portllm.training.train import Training, train
from tests.language import make_reader
from tests.models import make_adapter, make_evolved
from tests.safetensors_files import contents

FORMAT = {"prompt": "{question} Kind:", "completion": "kind"}
ROWS = [
    {"question": "what causes measles?", "kind": "cause"},
    {"question": "how is a fever treated?", "kind": "treatment"},
    {"question": "what causes a cold?", "kind": "cause"},
]
STILL = TrainSettings(learning_rate=1e-30, steps=1)
"""A step that is too small for any float32 factor to notice."""


def distil(base, *, data, prompt, teacher, **options):
    return Training(
        base=base, lesson=read_questions(read_data(data, prompt=prompt, answers=False), teacher), **options
    ).run(device="cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, a patch trained on it, an evolved model, and the patch ported to it."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setenv("PORTLLM_CACHE", str(folder / "cache"))
        base = open_checkpoint(make_reader(folder / "base"))
        evolved = make_evolved(folder / "base", folder / "evolved")
        load_tokenizer(folder / "base").save_pretrained(evolved)
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        settings = TrainSettings(rank=2, alpha=3, use_rslora=True, learning_rate=3e-2, steps=20)
        patch, _ = train(base, data=data, **FORMAT, out=folder / "patch", settings=settings, device="cpu")
        evolved = open_checkpoint(evolved)
        ported = port(patch, evolved=evolved, out=folder / "ported")
    return {"base": base, "evolved": evolved, "patch": patch, "ported": ported, "data": data}


def factors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_ported_patch_that_is_not_moved_is_the_same_and_the_record_says_where_it_began(world, tmp_path):
    started, _ = train(
        world["evolved"],
        data=world["data"],
        **FORMAT,
        out=tmp_path / "started",
        settings=STILL,
        start=world["ported"],
        device="cpu",
    )
    before, after = factors(Path(world["ported"].name)), factors(tmp_path / "started")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {d.scale for d in started.deltas.values()} == {d.scale for d in world["patch"].deltas.values()}
    settings = started.record.capture.settings
    assert (settings["rank"], settings["alpha"], settings["use_rslora"]) == (2, 3, True)
    origin = settings["init_from"]
    assert origin["tensors"] == world["ported"].record.tensors
    assert origin["ports"][0]["method"] == "add"
    assert origin["ports"][0]["from"]["fingerprint"] == world["patch"].record.base.fingerprint
    assert started.record.base.fingerprint == world["ported"].record.base.fingerprint
    assert started.record.ports == ()


def test_a_patch_of_another_base_is_refused_and_told_to_be_ported(world, tmp_path):
    with pytest.raises(PlanRefusedError, match="portllm port"):
        train(world["evolved"], data=world["data"], **FORMAT, out=tmp_path / "no", start=world["patch"], device="cpu")
    assert not (tmp_path / "no").exists()


def test_a_patch_of_more_than_lora_is_not_started_from(world, tmp_path):
    adapter = load_patch(make_adapter(world["base"].folder, tmp_path / "dora", use_dora=True))
    dora = capture_adapter(adapter, base=world["base"], out=tmp_path / "patch")
    with pytest.raises(PlanRefusedError, match="more than LoRA deltas"):
        train(world["base"], data=world["data"], **FORMAT, out=tmp_path / "no", start=dora, device="cpu")


def test_a_patch_does_not_replace_the_rows_or_the_patch_that_it_is_trained_on(world, tmp_path):
    rows = shutil.copy(world["data"], shutil.copytree(world["patch"].name, tmp_path / "patch"))
    start = load_patch(tmp_path / "patch")
    teacher = Teacher(world["base"], start)
    asked = {**FORMAT, "device": "cpu", "overwrite": True}
    before = contents(tmp_path)
    for work in (
        lambda out: train(world["base"], data=rows, out=out, **asked),
        lambda out: train(world["base"], data=world["data"], out=out, start=start, **asked),
        lambda out: distil(
            world["base"], data=world["data"], prompt=FORMAT["prompt"], teacher=teacher, out=out, overwrite=True
        ),
    ):
        with pytest.raises(OutputError, match="which is an input"):
            work(tmp_path / "patch")
    assert contents(tmp_path) == before


def test_a_refreshed_patch_is_closer_to_the_old_tuned_model_and_says_who_taught_it(world, tmp_path):
    patch, report = distil(
        world["evolved"],
        data=world["data"],
        prompt="{question} Kind:",
        teacher=Teacher(world["base"], world["patch"], max_new_tokens=4),
        out=tmp_path / "refreshed",
        settings=TrainSettings(learning_rate=1e-2, steps=20),
        start=world["ported"],
    )
    assert report.losses[-1] < 0.7 * report.losses[0]
    settings = patch.record.capture.settings
    assert settings["teacher"]["patch"]["tensors"] == world["patch"].record.tensors
    assert settings["teacher"]["base"]["fingerprint"] == world["patch"].record.base.fingerprint
    assert settings["teacher"]["max_new_tokens"] == 4
    assert settings["init_from"]["ports"]
    assert (settings["prompt"], settings["completion"]) == ("{question} Kind:", "kind")
    assert load_patch(tmp_path / "refreshed").record == patch.record


def test_answers_in_the_data_are_not_read(world, tmp_path):
    made = []
    for name, answer in (("true", "kind"), ("none", None)):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"question": r["question"], answer or "x": r["kind"]}) + "\n" for r in ROWS))
        out = tmp_path / name
        teacher = Teacher(world["base"], world["patch"], max_new_tokens=4)
        distil(
            world["evolved"],
            data=data,
            prompt="{question} Kind:",
            teacher=teacher,
            out=out,
            settings=TrainSettings(steps=2),
        )
        made.append((out / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_a_teacher_whose_patch_is_of_another_base_is_refused(world, tmp_path):
    teacher = Teacher(world["evolved"], world["patch"])
    with pytest.raises(PlanRefusedError, match="--teacher"):
        distil(world["evolved"], data=world["data"], prompt="{question}", teacher=teacher, out=tmp_path / "no")


def test_an_output_that_exists_is_kept(world, tmp_path):
    with pytest.raises(OutputExistsError):
        distil(
            world["evolved"],
            data=world["data"],
            prompt="{question}",
            teacher=Teacher(world["base"], world["patch"]),
            out=tmp_path,
        )
