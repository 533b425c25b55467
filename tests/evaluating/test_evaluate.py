"""Evaluating: what is refused before a model is loaded."""

import json
import shutil

import pytest

from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError, PlanRefusedError
from portllm.evaluating.evaluate import plan_evaluation
from portllm.patch import name_pattern
from portllm.patch.adapter_folder import load_patch


def test_an_adapter_that_peft_could_match_forever_does_not_reach_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(name_pattern, "TRIAL_SECONDS", 0.5)
    base, evolved, hostile = open_checkpoint(tiny("base")), open_checkpoint(tiny("evolved")), tmp_path / "hostile"
    shutil.copytree(tiny("adapter"), hostile)
    config = json.loads((hostile / "adapter_config.json").read_text())
    config["target_modules"] = r"(.*[a-z]){30}!|.*_proj"
    (hostile / "adapter_config.json").write_text(json.dumps(config))
    good = load_patch(tiny("adapter"))
    with pytest.raises(PlanRefusedError) as refused:
        plan_evaluation(base=base, patch=load_patch(hostile), evolved=evolved, ported=good, allow_other_base=True)
    assert str(refused.value).startswith("--patch: ")
    assert "that PEFT could take forever to match" in str(refused.value)
    with pytest.raises(PlanRefusedError, match="could take forever to match"):
        plan_evaluation(
            base=base, patch=good, evolved=evolved, ported=good, rivals=[load_patch(hostile)], allow_other_base=True
        )
    with pytest.raises(CheckpointError, match="has no 'tokenizer.json'"):  # nothing but that is wrong with the others
        plan_evaluation(base=base, patch=good, evolved=evolved, ported=good, allow_other_base=True)
