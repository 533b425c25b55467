"""Vocabularies that differ: what belongs to a token goes where the evolved model has it, by its string."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.open import open_checkpoint
from portllm.matching.port_plan import plan_port
from portllm.matching.token_rows import map_tokens
from portllm.matching.update import Update
from portllm.merging.merge import merge
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from portllm.porting.text import render_port
from portllm.show.headline import Headline
from portllm.tensors.tensors import load

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*tie"),
]

LOGITS_TOLERANCE = 2e-5
OLD = [f"t{number}" for number in range(30)]
"""Tokens of the base; its last row, 30, stands for none."""
NEW = ["<new>", *reversed(OLD[:7]), *OLD[10:], "<newer>", "<newest>"]
"""Tokens of the evolved model: all stand elsewhere, three are gone, three are new; rows 30 to 32 stand for none."""
GONE = {"t7", "t8", "t9"}
N_EVOLVED = 33

KINDS = {
    "saved embedding and head": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "saved tied embedding, kept tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "token rows": ({"trainable_token_indices": [3, 8, 12, 0]}, False),
    "tied token rows": ({"trainable_token_indices": [3, 8, 12, 0]}, True),
    "token rows by module": ({"trainable_token_indices": {"embed_tokens": [8, 5], "lm_head": [9]}}, False),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "tied embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, True),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, False),
}


def give_tokens(folder, tokens):
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {token: n for n, token in enumerate(tokens)}}})
    )


@pytest.fixture
def models(tiny, tmp_path):
    """A base with a tokenizer, and an evolved model with another: moved in every weight, and of another length."""

    def make(*, tied):
        source = tiny("base", dtype=torch.float32, tied=tied)
        base, evolved = tmp_path / "base", tmp_path / "evolved"
        shutil.copytree(source, base)
        shutil.copytree(tiny("evolved", of=source, drift=0.05), evolved)
        give_tokens(base, OLD)
        give_tokens(evolved, NEW)
        config = json.loads((evolved / "config.json").read_text())
        (evolved / "config.json").write_text(json.dumps({**config, "vocab_size": N_EVOLVED}))
        tensors = load_file(evolved / "model.safetensors")
        for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors):
            fresh = torch.randn(N_EVOLVED, 12, generator=torch.Generator().manual_seed(7)) * 0.2
            for row, token in enumerate(NEW):
                if token in OLD:
                    fresh[row] = tensors[name][OLD.index(token)]
            tensors[name] = fresh
        save_file(tensors, evolved / "model.safetensors", metadata={"format": "pt"})
        return base, evolved

    return make


def stored(folder):
    return {name: load(info) for name, info in open_checkpoint(folder).infos.items()}


def expected_on(evolved, base, tuned):
    """Evolved with every change added by hand, rows by their token's string."""
    from transformers import AutoModelForCausalLM

    before, after = stored(base), stored(tuned)
    model = AutoModelForCausalLM.from_pretrained(evolved, dtype=torch.float32).eval()
    if "lm_head.weight" in after and "lm_head.weight" not in before:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        before["lm_head.weight"] = before["model.embed_tokens.weight"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change = after[name] - before[name]
            if parameter.shape[0] == N_EVOLVED:
                for row, token in enumerate(NEW):
                    if token in OLD:
                        parameter[row] += change[OLD.index(token)]
                parameter[30] += change[30]  # it stands for no token in either
            else:
                parameter += change
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_what_belongs_to_a_token_goes_where_the_evolved_model_has_it(kind, models, tmp_path):
    from tests.models import load_tuned, logits, make_adapter

    lora, tied = KINDS[kind]
    base, evolved = models(tied=tied)
    adapter = make_adapter(base, tmp_path / "adapter", **{"target_modules": ["q_proj"], **lora})
    patch = load_patch(adapter)
    merge(patch, into=open_checkpoint(base), out=tmp_path / "tuned")
    ported = port(patch, base=open_checkpoint(base), evolved=open_checkpoint(evolved), out=tmp_path / "ported")

    expected = logits(expected_on(evolved, base, tmp_path / "tuned"))
    found = logits(load_tuned(evolved, tmp_path / "ported"))
    assert (found - expected).abs().max() < LOGITS_TOLERANCE * expected.abs().max()
    (step,) = ported.record.ports
    lost = {token for tokens in step.left_out.values() for token in tokens}
    named = lora.get("trainable_token_indices")
    if isinstance(named, dict):
        assert lost == {"t8", "t9"}
    elif named:
        assert lost == {"t8"}
    else:
        assert lost == GONE
    assert json.loads((tmp_path / "ported" / "patch.json").read_text())["ports"][0]["left_out"]


@pytest.mark.parametrize(("token", "status"), [(8, 3), (5, 0)])
def test_trained_rows_of_tokens_that_are_gone_are_named_and_the_status_is_three(
    token, status, models, portllm, tmp_path
):
    from tests.models import make_adapter

    base, evolved = models(tied=False)
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [token]}
    )
    result = portllm("port", adapter, "--base", base, "--evolved", evolved, "-o", tmp_path / "ported")
    assert result.status == status
    assert ("trained rows of 't8' are left out" in result.err) == (status == 3)


def test_token_ids_in_the_configuration_are_those_of_the_evolved_model(models, tmp_path):
    from tests.models import make_adapter

    base, evolved = models(tied=False)
    fields = {"trainable_token_indices": {"embed_tokens": [8, 5], "lm_head": [9]}}
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **fields)
    ported = port(
        load_patch(adapter), base=open_checkpoint(base), evolved=open_checkpoint(evolved), out=tmp_path / "ported"
    )
    assert ported.config.fields["trainable_token_indices"] == {"embed_tokens": [NEW.index("t5")]}
    assert {name: rows.rows for name, rows in ported.rows.items()} == {"model.embed_tokens.weight": (NEW.index("t5"),)}


def test_the_plan_says_how_many_tokens_moved_and_which_are_gone(models, tmp_path):
    from tests.models import make_adapter

    base, evolved = models(tied=False)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[3])
    plan = plan_port(load_patch(adapter), Update(open_checkpoint(base), open_checkpoint(evolved)))
    assert plan.refusals == ()
    moved = [token for token in OLD if token in NEW and NEW.index(token) != OLD.index(token)]
    assert plan.tokens.n_moved == len(moved) > 20
    assert set(plan.tokens.gone.values()) == GONE
    text = render_port(plan, tmp_path / "out", Headline("plain", "said first"), None)
    assert f"{len(moved)} tokens moved to another row; 3 tokens of the base are missing: 't7', 't8', 't9'" in text


def test_a_patch_that_changes_no_token_row_does_not_ask_for_tokens(models, tmp_path):
    from tests.models import make_adapter

    base, evolved = models(tied=False)
    patch = load_patch(make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"]))
    plan = plan_port(patch, Update(open_checkpoint(base), open_checkpoint(evolved)))
    assert (plan.tokens, plan.refusals) == (None, ())


@pytest.mark.parametrize("kind", ["embedding", "head"])
def test_a_delta_of_token_rows_is_not_ported_without_the_base(kind, models, tmp_path):
    from tests.models import make_adapter

    lora, tied = KINDS[kind]
    base, evolved = models(tied=tied)
    adapter = load_patch(make_adapter(base, tmp_path / "adapter", **lora))
    patch = capture_adapter(adapter, base=open_checkpoint(base), out=tmp_path / "patch")
    reasons = {
        refusal.where: refusal.reason for refusal in plan_port(patch, Update(None, open_checkpoint(evolved))).refusals
    }
    assert "They are m" in reasons["--base"]


def test_without_a_tokenizer_another_length_is_refused(models, tmp_path):
    from tests.models import make_adapter

    base, evolved = models(tied=False)
    (evolved / "tokenizer.json").unlink()
    patch = load_patch(make_adapter(base, tmp_path / "adapter", **KINDS["saved embedding and head"][0]))
    plan = plan_port(patch, Update(open_checkpoint(base), open_checkpoint(evolved)))
    assert {refusal.where for refusal in plan.refusals} == {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_dora_of_the_head_cannot_follow_tokens(models, tmp_path):
    from tests.models import make_adapter

    base, evolved = models(tied=False)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"], use_dora=True)
    plan = plan_port(load_patch(adapter), Update(open_checkpoint(base), open_checkpoint(evolved)))
    assert [(refusal.where, "cannot be moved" in refusal.reason) for refusal in plan.refusals] == [("lm_head", True)]


def test_equal_tokenizers_change_nothing(models, tmp_path):
    from tests.models import make_adapter

    base, _ = models(tied=False)
    patch = load_patch(make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"]))
    plan = plan_port(patch, Update(open_checkpoint(base), open_checkpoint(base)))
    assert plan.tokens is None


tokens = st.lists(st.sampled_from("abcdefghij"), unique=True, max_size=8)


@given(tokens, tokens, st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_every_row_of_the_base_has_one_place_or_is_gone(old, new, old_padding, new_padding):
    n_base, n_evolved = len(old) + old_padding, len(new) + new_padding
    vocabularies = ({token: row for row, token in enumerate(part)} for part in (old, new))
    found = map_tokens(*vocabularies, n_base=n_base, n_evolved=n_evolved)
    if found is None:
        assert n_base == n_evolved
        assert all(token in old and old.index(token) == new.index(token) for token in new if token in old)
        assert set(old) <= set(new)
        return
    places = found.places
    assert sorted([*places, *found.gone]) == list(range(n_base))
    assert len(set(places.values())) == len(places)
    assert len(found.rows) == n_evolved
    for token in set(old) & set(new):
        assert places[old.index(token)] == new.index(token)
    assert {token for token in old if token not in new} <= set(found.gone.values())
