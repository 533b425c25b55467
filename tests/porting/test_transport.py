"""A port to a model that computes the same with other units, from end to end."""

import re
import shutil

import pytest
import torch

from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError, PlanRefusedError
from portllm.patch.adapter_folder import load_patch
from portllm.porting.domain import Domain
from portllm.porting.port import port
from portllm.running.writing import write_layered
from portllm.study.parts.control import TwinSettings, make_control
from tests.language import make_reader
from tests.models import load_tuned, make_adapter, make_evolved

WORDS = ("fever", "cold", "measles", "rest", "tea", "time", "clinic", "risk", "cause", "kind", "who", "what", "answer")
PROMPTS = tuple(f"{one} {other}" for one in WORDS for other in WORDS[:4])
ANCHORS = tuple(f"{one} {other} {third}" for one, other, third in zip(WORDS, WORDS[5:], WORDS[3:], strict=False)) * 4

UNSEEN = torch.randint(300, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transported")
    base = make_reader(folder / "base", dtype=torch.float32)
    evolved = make_evolved(base, folder / "evolved", drift=0.001)
    make_control(open_checkpoint(base), TwinSettings(seed=1), folder / "twin")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for other in (evolved, folder / "twin"):
            shutil.copy(base / name, other / name)
    return {"base": base, "evolved": evolved, "twin": folder / "twin", "folder": folder}


def carry(story, patch, out, *, to="twin"):
    domain = Domain(prompts=PROMPTS, device="cpu", answer_tokens=2, anchors=ANCHORS)
    return port(patch, evolved=story[to], base=story["base"], method="transport", out=out, domain=domain)


def logits(base, adapter):
    with torch.no_grad():
        return load_tuned(base, adapter, dtype=torch.float64)(UNSEEN).logits


def test_a_twin_with_the_ported_patch_answers_as_the_old_specialist_in_peft(portllm, story, tmp_path, monkeypatch):
    wrote = []
    monkeypatch.setattr(
        "portllm.porting.domain.write_layered", lambda *a, **how: wrote.append(a) or write_layered(*a, **how)
    )
    patch = make_adapter(story["base"], tmp_path / "patch", size=0.2, r=5)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "anchors.txt").write_text("\n".join(ANCHORS))
    texts = ("--text", tmp_path / "prompts.txt", "--anchors", tmp_path / "anchors.txt", "--answer-tokens", "2")
    models = ("--base", story["base"], "--evolved", story["twin"], "--device", "cpu")
    done = portllm("port", patch, *models, "--method", "transport", *texts, "-q", "-o", tmp_path / "out")
    assert done.status == 0, done.err
    assert len(wrote) == 1, "answers were written again"
    assert re.search(r"not carried +at most 0.00 % of what a module's A reads, and 0.00 % of its B", done.out)
    step = load_patch(tmp_path / "out").record.ports[-1]
    assert step.method == "transport"
    assert step.evidence["agreement"] == 1
    assert step.evidence["divergence"] < 1e-9
    old = logits(story["base"], patch)
    assert (logits(story["twin"], tmp_path / "out") - old).abs().max() < 1e-4
    assert (logits(story["twin"], patch) - old).abs().max() > 0.1


@pytest.mark.slow
def test_where_addition_is_as_good_the_factors_stay_as_they_are_byte_for_byte(story, tmp_path):
    patch = make_adapter(story["base"], tmp_path / "patch", size=0.2, r=5)
    step = carry(story, patch, tmp_path / "out", to="base").record.ports[-1]
    assert step.method == "transport: add"
    from safetensors.torch import load_file

    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (patch, tmp_path / "out"))
    assert all(tensor.equal(after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"modules_to_save": ["norm"]}], ids=["DoRA", "a module saved whole"]
)
def test_what_has_no_meaning_in_another_basis_is_refused_by_reason(story, tmp_path, lora):
    patch = make_adapter(story["base"], tmp_path / "patch", **lora)
    with pytest.raises(PlanRefusedError, match="changes more than the weights of linear modules by A and B"):
        carry(story, patch, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_outside_of_the_layers_is_refused(story, tmp_path):
    untied = make_reader(tmp_path / "untied", dtype=torch.float32, tied=False)
    patch = make_adapter(untied, tmp_path / "patch", target_modules=["lm_head", "q_proj"])
    with pytest.raises(CheckpointError, match="'lm_head': lies outside of the model's layers"):
        carry({"base": untied, "twin": untied}, patch, tmp_path / "out")
