"""Embeddings and heads of other names than usual, tied or with a bias: copies, tied rows and added tokens."""

from functools import cache

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import PlanRefusedError
from portllm.merging.merge import merge
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from tests.matching.test_added_tokens import assert_close, give_tokens, loaded, logits
from tests.model_types import fill, shrunk
from tests.models import adapter_of, resized

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*tie"),
    pytest.mark.filterwarnings("ignore:Model has"),
]
WORDS = 64
CALL, END = WORDS, WORDS + 1
IDS = ((5, CALL, 9, END, 3),)
NEOX, BLOOM, PHI = "gpt_neox", "bloom", "phi"
TARGETS = {NEOX: "query_key_value", BLOOM: "query_key_value", PHI: "q_proj"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base and an evolved model of a type, each made once."""

    @cache
    def make(model_type, tied):
        kind = transformers.CONFIG_MAPPING[model_type]
        model = AutoModelForCausalLM.from_config(kind(**shrunk(kind()), tie_word_embeddings=tied)).eval().float()
        folders = []
        for seed in (1, 2):
            fill(model, seed, 0.15)
            folders.append(give_tokens_of(model, tmp_path_factory.mktemp("model")))
        return folders

    return make


def give_tokens_of(model, folder):
    model.save_pretrained(folder)
    return give_tokens(folder, words=WORDS)


CASES = {
    "rows of the embedding, stored for a tied head too": (BLOOM, True, {"word_embeddings": [7, CALL, END]}, {}),
    "the same, and the head frozen": (NEOX, True, {"embed_in": [7, CALL, END]}, {}),
    "a tie that PEFT does not see": (NEOX, True, None, {"modules_to_save": ["embed_in"], "ensure_weight_tying": True}),
    "no tie to keep": (BLOOM, False, None, {"modules_to_save": ["word_embeddings"], "ensure_weight_tying": True}),
    "a head with a bias": (PHI, False, None, {}),
    "a head with a bias, saved whole": (PHI, False, None, {"modules_to_save": ["embed_tokens", "lm_head"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resized_model_goes_through_capture_merge_and_port(case, made, tmp_path):
    model_type, tied, rows, fields = CASES[case]
    base, evolved = made(model_type, tied)
    lora = {"target_modules": [TARGETS[model_type]], "trainable_token_indices": rows, **fields}
    adapter, tuned = adapter_of(resized(base, WORDS + 4), tmp_path / "adapter", **lora)
    give_tokens(adapter, "<call>", "<end>", words=WORDS)
    expected = logits(tuned, IDS)
    patch = capture_adapter(load_patch(adapter), base=open_checkpoint(base), out=tmp_path / "patch")
    assert_close(in_peft(base, tmp_path / "patch"), expected)
    merge(adapter, into=base, out=tmp_path / "merged")
    assert_close(logits(loaded(tmp_path / "merged"), IDS), expected)
    port(patch, base=base, evolved=evolved, out=tmp_path / "ported")
    merge(tmp_path / "ported", into=evolved, out=tmp_path / "merged-evolved")
    assert_close(logits(loaded(tmp_path / "merged-evolved"), IDS), in_peft(evolved, tmp_path / "ported"))


def in_peft(base, patch):
    return logits(PeftModel.from_pretrained(resized(base, WORDS + 4, seed=99), patch).eval(), IDS)


def test_the_bias_of_a_head_with_trained_rows_has_a_place_in_a_merge_alone(made, tmp_path):
    base, _ = made(PHI, False)
    rows = {name: [CALL, END] for name in ("embed_tokens", "lm_head")}
    adapter, tuned = adapter_of(
        resized(base, WORDS + 4), tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=rows
    )
    give_tokens(adapter, "<call>", "<end>", words=WORDS)
    merge(adapter, into=base, out=tmp_path / "merged")
    assert_close(logits(loaded(tmp_path / "merged"), IDS), logits(tuned, IDS))
    with pytest.raises(PlanRefusedError, match="PEFT has no place"):
        capture_adapter(load_patch(adapter), base=open_checkpoint(base), out=tmp_path / "patch")


@pytest.mark.parametrize("tied", [True, False])
def test_the_copied_bias_of_an_adapted_head_is_no_trained_one(tied, made, tmp_path):
    base, _ = made(PHI, tied)
    adapter, tuned = adapter_of(loaded(base), tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    patch = capture_adapter(load_patch(adapter), base=open_checkpoint(base), out=tmp_path / "patch")
    assert not patch.values
    merge(patch, into=base, out=tmp_path / "merged")
    with torch.no_grad():
        assert_close(logits(loaded(tmp_path / "merged"), ((5, 6, 7),)), logits(tuned, ((5, 6, 7),)))
