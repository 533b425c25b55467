"""Heads that only the patch has: carried as they are, and merged into the model of their class."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.open import open_checkpoint
from portllm.merging.merge import merge
from portllm.merging.plan import plan_merge
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from tests.models import fill_at_random, make_base, make_evolved

LOGITS_TOLERANCE = 2e-5
"""Of the largest logit, in float32, where W x + B A x is summed in another order than (W + B A) x."""
KINDS = {
    "SEQ_CLS": (AutoModelForSequenceClassification, "LlamaForSequenceClassification"),
    "TOKEN_CLS": (AutoModelForTokenClassification, "LlamaForTokenClassification"),
}


def loaded(task, folder, **how):
    return KINDS[task][0].from_pretrained(folder, dtype=torch.float32, **how).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[3, 9, 14, 5]])).logits


def assert_close(found, expected):
    assert (found - expected).abs().max() < LOGITS_TOLERANCE * expected.abs().max()


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """A causal base, its evolved version, and an adapter with a head of three labels."""
    base = make_base(tmp_path_factory.mktemp("base"), tied=False, dtype=torch.float32)
    evolved = make_evolved(base, tmp_path_factory.mktemp("evolved"))
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], task_type=request.param)
    tuned = get_peft_model(loaded(request.param, base, num_labels=3), lora)
    fill_at_random([pair for pair in tuned.named_parameters() if pair[1].requires_grad], seed=1, size=0.3)
    adapter = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(adapter)
    return request.param, base, evolved, adapter


def test_a_merge_is_a_model_of_the_heads_class(made, tmp_path):
    task, base, _, adapter = made
    report = merge(adapter, into=base, out=tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == [KINDS[task][1]]
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    expected = logits(PeftModel.from_pretrained(loaded(task, base, num_labels=3), adapter).eval())
    assert_close(logits(loaded(task, tmp_path / "merged")), expected)
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "merged").infos
    assert report.into.digest is None


def test_the_head_is_carried_as_it_is(made, tmp_path):
    task, base, evolved, adapter = made
    capture_adapter(load_patch(adapter), base=open_checkpoint(base), out=tmp_path / "patch")
    port(tmp_path / "patch", evolved=evolved, out=tmp_path / "ported")
    merge(tmp_path / "ported", into=evolved, out=tmp_path / "merged")
    expected = logits(PeftModel.from_pretrained(loaded(task, evolved, num_labels=3), adapter).eval())
    assert logits(PeftModel.from_pretrained(loaded(task, evolved, num_labels=3), tmp_path / "ported").eval()).equal(
        expected
    )
    assert_close(logits(loaded(task, tmp_path / "merged")), expected)


def test_labels_are_named_as_the_adapters_folder_says(made, tmp_path):
    _, base, _, adapter = made
    named = tmp_path / "named"
    named.mkdir()
    for file in adapter.iterdir():
        (named / file.name).write_bytes(file.read_bytes())
    (named / "config.json").write_text(json.dumps({"id2label": {"0": "no", "1": "maybe", "2": "yes"}}))
    patch = capture_adapter(load_patch(named), base=open_checkpoint(base), out=tmp_path / "patch")
    assert patch.labels == patch.record.labels == ("no", "maybe", "yes")
    plan = plan_merge(patch, into=open_checkpoint(base))
    assert plan.config_changes["label2id"] == {"no": 0, "maybe": 1, "yes": 2}


def test_a_head_of_no_task_is_not_merged_and_the_way_out_is_told(made, tmp_path):
    _, base, _, adapter = made
    untold = tmp_path / "untold"
    untold.mkdir()
    for file in adapter.iterdir():
        (untold / file.name).write_bytes(file.read_bytes())
    config = json.loads((untold / "adapter_config.json").read_text())
    (untold / "adapter_config.json").write_text(json.dumps({**config, "task_type": None}))
    (refusal,) = plan_merge(load_patch(untold), into=open_checkpoint(base)).refusals
    assert refusal.where.startswith("score.")
    assert "Set task_type in adapter_config.json to one of SEQ_CLS, TOKEN_CLS" in refusal.reason
