"""Tokens that were added for an adapter: their rows are the patch's own, wherever it goes, and none is ever lost."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from portllm.capturing.adapter import capture_adapter, plan_capture
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import PlanRefusedError
from portllm.matching.carried_tokens import carry_tokens
from portllm.merging.merge import merge
from portllm.merging.plan import plan_merge
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from tests.models import VOCABULARY, adapter_of, make_base, make_evolved, resized

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*tie"),
    pytest.mark.filterwarnings("ignore:Model has"),
]

LOGITS_TOLERANCE = 2e-5
"""Of the largest logit, in float32, where W x + B A x is summed in another order than (W + B A) x."""
CALL, END = VOCABULARY, VOCABULARY + 1
N_RESIZED = VOCABULARY + 4
"""Two rows for the added tokens, and two that pad."""

KINDS = {
    "frozen": ({}, False),
    "frozen, tied": ({}, True),
    "rows of old and new": ({"trainable_token_indices": [7, END]}, False),
    "rows, tied": ({"trainable_token_indices": {"embed_tokens": [CALL, END], "lm_head": [CALL, END]}}, True),
    "saved whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "one half of a tied matrix saved whole": ({"modules_to_save": ["lm_head"]}, True),
    "factors": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
}


def give_tokens(folder, *added, words=VOCABULARY):
    entries = [{"id": words + n, "content": token, "special": True} for n, token in enumerate(added)]
    vocabulary = {f"t{number}": number for number in range(words)}
    tokenizer = {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}, "added_tokens": entries}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def logits(model, ids=((5, CALL, 9, END, 3),)):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float()


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < LOGITS_TOLERANCE * expected.abs().max()


def in_peft(base, patch, n_rows=N_RESIZED):
    """The logits of a patch as PEFT loads it on a model that was resized for it, with other numbers in the new rows."""
    return logits(PeftModel.from_pretrained(resized(base, n_rows, seed=99), patch).eval())


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base and an evolved model of one vocabulary, and an adapter of a kind with two more tokens; each made once."""
    known = {}

    def make(kind):
        lora, tied = KINDS[kind]
        if tied not in known:
            base = give_tokens(make_base(tmp_path_factory.mktemp("base"), tied=tied, dtype=torch.float32))
            known[tied] = base, give_tokens(make_evolved(base, tmp_path_factory.mktemp("evolved")))
        if kind not in known:
            base, evolved = known[tied]
            adapter, tuned = adapter_of(resized(base, N_RESIZED), tmp_path_factory.mktemp("adapter"), **lora)
            known[kind] = base, evolved, give_tokens(adapter, "<call>", "<end>"), logits(tuned)
        return known[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_patch_gives_peft_the_logits_of_the_adapter_on_a_base_that_is_resized_for_it(kind, made, tmp_path):
    base, _, adapter, expected = made(kind)
    patch = capture_adapter(load_patch(adapter), base=open_checkpoint(base), out=tmp_path / "patch")
    assert patch.record.added_tokens == {"<call>": CALL, "<end>": END}
    assert_close(in_peft(base, tmp_path / "patch"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_writes_the_resized_model(kind, made, tmp_path):
    base, _, adapter, expected = made(kind)
    merge(adapter, into=base, out=tmp_path / "merged")
    assert_close(logits(loaded(tmp_path / "merged")), expected)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == N_RESIZED
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_ported_patch_does_in_peft_what_its_merge_does(kind, made, tmp_path):
    base, evolved, adapter, _ = made(kind)
    port(adapter, base=base, evolved=evolved, out=tmp_path / "ported")
    merge(tmp_path / "ported", into=evolved, out=tmp_path / "merged")
    assert_close(logits(loaded(tmp_path / "merged")), in_peft(evolved, tmp_path / "ported"))


def test_a_token_goes_to_the_row_that_the_evolved_model_has_for_it_or_behind_its_last(made, tmp_path):
    base, _, adapter, _ = made("rows of old and new")
    grown = tmp_path / "grown"
    resized(base, VOCABULARY + 2).save_pretrained(grown)
    give_tokens(grown, "<new>", "<end>")
    ported = port(adapter, base=base, evolved=grown, out=tmp_path / "ported")
    assert ported.record.added_tokens == {"<end>": VOCABULARY + 1, "<call>": VOCABULARY + 2}
    stored = load_file(adapter / "adapter_model.safetensors")
    trained = stored["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    copy = stored["base_model.model.model.embed_tokens.token_adapter.base_layer.weight"]
    rows = ported.rows["model.embed_tokens.weight"]
    found = load_file(tmp_path / "ported" / "adapter_model.safetensors")[rows.values.name]
    by_row = dict(zip(rows.rows, found, strict=True))
    assert by_row[VOCABULARY + 1].equal(trained[1])
    assert by_row[VOCABULARY + 2].equal(copy[CALL])
    entries = json.loads((tmp_path / "ported" / "tokenizer.json").read_text())["added_tokens"]
    assert {entry["content"]: entry["id"] for entry in entries} == {
        "<new>": VOCABULARY,
        "<end>": VOCABULARY + 1,
        "<call>": VOCABULARY + 2,
    }


def test_trained_rows_of_added_tokens_of_the_base_are_not_lost_where_the_evolved_model_lacks_these(made, tmp_path):
    base, evolved, *_ = made("frozen")
    grown = tmp_path / "grown"
    resized(base, VOCABULARY + 2).save_pretrained(grown)
    give_tokens(grown, "<call>", "<end>")
    adapter, _ = adapter_of(loaded(grown), tmp_path / "adapter", trainable_token_indices=[CALL])
    ported = port(adapter, base=grown, evolved=evolved, out=tmp_path / "ported")
    assert ported.record.added_tokens == {"<call>": CALL}
    assert ported.config.fields["trainable_token_indices"]["model.embed_tokens"] == [CALL]
    assert ported.record.ports[-1].left_out == {}


def test_rows_that_no_tokenizer_explains_are_refused_with_both_sizes_and_the_way_out(made, tmp_path):
    base, _, _, _ = made("frozen")
    adapter, _ = adapter_of(resized(base, N_RESIZED), tmp_path / "adapter")
    with pytest.raises(PlanRefusedError, match=f"of {N_RESIZED} rows.* has {VOCABULARY}.*resize_token_embeddings"):
        merge(adapter, into=base, out=tmp_path / "merged")


def test_a_tokenizer_with_tokens_whose_rows_were_not_saved_is_refused(made, tmp_path):
    base, _, _, _ = made("frozen")
    lora = {"target_modules": ["q_proj", "embed_tokens"]}
    adapter, _ = adapter_of(resized(base, N_RESIZED), tmp_path / "adapter", **lora)
    give_tokens(adapter, "<call>", "<end>")
    (refusal,) = plan_capture(load_patch(adapter), base=open_checkpoint(base)).refusals
    assert refusal.where == "lm_head.weight"
    assert "'<call>', '<end>'" in refusal.reason


def test_rows_that_pad_to_a_multiple_do_so_in_the_evolved_model(made, tmp_path):
    base, _, _, _ = made("frozen")
    n_padded = 64
    adapter, _ = adapter_of(resized(base, n_padded), tmp_path / "adapter")
    give_tokens(adapter, "<call>", "<end>")
    patch = plan_merge(load_patch(adapter), into=open_checkpoint(base)).patch
    larger = tmp_path / "larger"
    resized(base, 64).save_pretrained(larger)
    give_tokens(larger, words=64)
    carried = carry_tokens(patch, open_checkpoint(base), open_checkpoint(larger), {"<call>": CALL, "<end>": END})
    assert carried.added == {"<call>": 64, "<end>": 65}
    assert carried.n_rows == 128
