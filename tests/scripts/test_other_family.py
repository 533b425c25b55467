"""A patch taken to a model of another width: exact on a base that computes the same there."""

import shutil

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from portllm.errors import PortLLMError
from portllm.porting.prompts import split
from scripts import other_family
from scripts.other_family import Setting, carry
from tests.language import make_reader
from tests.models import HIDDEN, load_tuned, make_adapter

WIDER = HIDDEN + 6
ANSWER_TOKENS = 1
WORDS = ("fever", "cold", "measles", "rest", "tea", "time", "clinic", "risk", "cause", "kind", "who", "what", "answer")
PROMPTS = [f"{one} {other}" for one in WORDS for other in WORDS]


def wider_twin(base, folder):
    """The same function with units that are always zero: a norm over more of them has weights that make up for it."""
    old = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = old.config
    config.hidden_size = WIDER
    config.rms_norm_eps = config.rms_norm_eps * HIDDEN / WIDER
    new = LlamaForCausalLM(config)
    with torch.no_grad():
        for (name, small), large in zip(old.named_parameters(), new.parameters(), strict=True):
            large.zero_()
            large[tuple(map(slice, small.shape))] = small * ((HIDDEN / WIDER) ** 0.5 if "norm" in name else 1.0)
    new.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    return folder


@pytest.fixture
def story(tmp_path, monkeypatch):
    exact = {"SETTINGS": [Setting(0.0, 1e-9)], "MAP_RIDGE": 1e-9, "GENERAL": 0.0, "ANSWER_TOKENS": ANSWER_TOKENS}
    for name, value in exact.items():
        monkeypatch.setattr(other_family, name, value)
    base = make_reader(tmp_path / "base", dtype=torch.float32)
    twin = wider_twin(base, tmp_path / "twin")
    patch = make_adapter(base, tmp_path / "patch", size=0.2, r=4, target_modules=["o_proj", "down_proj"])
    found = carry(base, patch, twin, PROMPTS, WORDS, tmp_path / "ported")
    return {"base": base, "patch": patch, "twin": twin, "ported": tmp_path / "ported", "found": found}


def answers(base, adapter, prompts):
    """What PEFT finds likeliest, token by token to the end mark."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), load_tuned(base, adapter, dtype=torch.float64)
    ids = [torch.tensor([tokenizer(prompt).input_ids]) for prompt in prompts]
    written = (model.generate(input_ids=each, max_new_tokens=ANSWER_TOKENS, do_sample=False) for each in ids)
    return [one[0, each.shape[1] :].tolist() for one, each in zip(written, ids, strict=True)]


def test_on_a_wider_twin_what_a_patch_writes_is_recovered_whole_and_peft_answers_as_the_results_have_it(story):
    prompts = [prompt for prompt, part in zip(PROMPTS, split(PROMPTS), strict=True) if part == "report"]
    before, after = (
        answers(story[base], story[patch], prompts) for base, patch in (("base", "patch"), ("twin", "ported"))
    )
    same = sum(one == other for one, other in zip(before, after, strict=True)) / len(prompts)
    found = story["found"]
    no_patch, carried = found["tried"].values()
    assert same == 1
    assert carried["divergence"] < 1e-10 < no_patch["divergence"]
    assert no_patch["agreement"][0] < carried["agreement"][0] <= same  # a part of a letter has no twin to agree with


@pytest.mark.parametrize("missing", ["rows", "retrained"])
def test_what_is_read_last_is_asked_for_first(missing, tmp_path, monkeypatch):
    base = make_reader(tmp_path / "base", dtype=torch.float32)
    given = {"base": base, "evolved": base, "task": "kind", "prompt": "{text}", "output": tmp_path / "out"}
    given |= {name: make_adapter(base, tmp_path / name, size=0.2) for name in ("patch", "retrained")}
    for name in ("text", "anchors", "rows"):
        given[name] = tmp_path / f"{name}.jsonl"
        given[name].write_text('{"text": "cold", "prompt": "cold", "completion": "rest"}\n', encoding="utf-8")
    given[missing] = tmp_path / "missing.jsonl"
    monkeypatch.setattr(other_family, "carry", lambda *_: pytest.fail("the fit began"))
    with pytest.raises(PortLLMError, match=r"missing\.jsonl"):
        other_family.main([part for name, value in given.items() for part in (f"--{name}", str(value))])
