"""What PEFT stores of the base's own weights: left out where it is a copy, kept where it was trained, never refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.capturing.adapter import capture_adapter, plan_capture
from portllm.checkpoint.open import open_checkpoint
from portllm.inspecting.inspect import summarize_patch
from portllm.inspecting.text import render_summary
from portllm.patch.adapter_folder import load_patch
from tests.models import VOCABULARY, adapter_of, make_base, resized

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*tie"),
]

N_RESIZED = VOCABULARY + 1
HEAD, EMBEDDING = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
KINDS = {
    "beside": ({}, ()),
    "saved whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, ("lm_head", "model.embed_tokens")),
    "rows": ({"trainable_token_indices": [3]}, ()),
    "factors": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, ()),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model with another vocabulary than the one it was made from, as it is saved, and adapters of it."""
    small = make_base(tmp_path_factory.mktemp("small"), tied=False, dtype=torch.float32)
    base = tmp_path_factory.mktemp("base")
    resized(small, N_RESIZED).save_pretrained(base)
    known = {}

    def make(kind):
        if kind not in known:
            known[kind], _ = adapter_of(resized(small, N_RESIZED), tmp_path_factory.mktemp("adapter"), **KINDS[kind][0])
        return base, known[kind]

    return make


def changed(adapter, folder, change):
    """A copy of an adapter with other tensors."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_the_base_are_no_part_of_the_patch(kind, made, tmp_path):
    base, adapter = made(kind)
    assert load_patch(adapter).base_copies
    patch = capture_adapter(load_patch(adapter), base=open_checkpoint(base), out=tmp_path / "patch")
    assert patch.base_copies == {}
    assert sorted(name.removesuffix(".weight") for name in patch.values) == sorted(KINDS[kind][1])


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_shows_them_and_names_what_is_held_whole(kind, made):
    _, adapter = made(kind)
    summary = summarize_patch(adapter)
    assert set(summary.copies) <= {"lm_head.weight", "model.embed_tokens.weight"}
    assert summary.copies
    assert summary.whole == KINDS[kind][1]
    text = render_summary(summary)
    assert "copies" in text
    assert ("held whole" in text) == bool(summary.whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_widened", [False, True])
def test_a_copy_that_was_rounded_to_the_training_dtype_is_one(dtype, is_widened, made, tmp_path):
    base, adapter = made("beside")

    def change(tensors):
        for key in (f"{HEAD}.weight", f"{EMBEDDING}.weight"):
            rounded = tensors[key].to(dtype)
            tensors[key] = rounded.float() if is_widened else rounded

    plan = plan_capture(load_patch(changed(adapter, tmp_path / "rounded", change)), base=open_checkpoint(base))
    assert (plan.refusals, dict(plan.patch.values)) == ((), {})
    assert "copy of the base's own weight" in plan.notes[0]


def test_an_embedding_that_differs_from_the_bases_was_trained_though_nothing_names_it(made, tmp_path):
    base, adapter = made("beside")

    def change(tensors):
        tensors[f"{EMBEDDING}.weight"] = tensors[f"{EMBEDDING}.weight"] + 1

    trained = changed(adapter, tmp_path / "trained", change)
    patch = capture_adapter(load_patch(trained), base=open_checkpoint(base), out=tmp_path / "patch")
    assert list(patch.values) == ["model.embed_tokens.weight"]
    assert patch.config.fields["modules_to_save"] == ["model.embed_tokens"]


def test_of_two_values_the_trained_one_counts_and_the_other_is_compared(made, tmp_path):
    base, adapter = made("saved whole")

    def original_beside(tensors):
        tensors[f"{HEAD}.weight"] = tensors[f"{HEAD}.original_module.weight"].clone()

    plan = plan_capture(
        load_patch(changed(adapter, tmp_path / "original", original_beside)), base=open_checkpoint(base)
    )
    assert plan.refusals == ()
    assert plan.patch.values["lm_head.weight"].values.name == f"{HEAD}.modules_to_save.weight"

    def neither(tensors):
        tensors[f"{HEAD}.weight"] = tensors[f"{HEAD}.weight"] + 1

    (refusal,) = plan_capture(
        load_patch(changed(adapter, tmp_path / "neither", neither)), base=open_checkpoint(base)
    ).refusals
    assert refusal.where == "lm_head"
