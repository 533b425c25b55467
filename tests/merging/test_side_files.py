"""Tokenizer and chat template saved with an adapter are kept with the patch, and follow into the merged model."""

import json
import shutil

import pytest

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.open import open_checkpoint
from portllm.merging.merge import merge
from portllm.merging.options import MergeOptions
from portllm.merging.plan import plan_merge
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from portllm.verifying.verify import verify

TEMPLATE = "{{ messages }}"


def tokenizer(*tokens, added=()):
    entries = [{"id": len(tokens) + n, "content": token} for n, token in enumerate(added)]
    return json.dumps({"model": {"vocab": {token: n for n, token in enumerate(tokens)}}, "added_tokens": entries})


@pytest.fixture
def made(tiny, tmp_path):
    """A base with a tokenizer, and an adapter with that and one token more, and with a chat template."""
    base, adapter = shutil.copytree(tiny("base"), tmp_path / "base"), shutil.copytree(tiny("adapter"), tmp_path / "a")
    (base / "tokenizer.json").write_text(tokenizer("a", "b"))
    (base / "tokenizer_config.json").write_text("{}")
    (adapter / "tokenizer.json").write_text(tokenizer("a", "b", added=["<call>"]))
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    return base, adapter


def test_a_patch_keeps_them_and_its_record_vouches_for_them(made, tmp_path):
    base, adapter = made
    patch = capture_adapter(load_patch(adapter), base=open_checkpoint(base), out=tmp_path / "patch")
    assert {"tokenizer.json", "chat_template.jinja"} <= set(patch.record.files)
    assert verify(tmp_path / "patch").verified
    assert verify(tmp_path / "patch").notes == ("not covered by the record: README.md",)
    (tmp_path / "patch" / "chat_template.jinja").write_text("another")
    assert not verify(tmp_path / "patch").verified


def test_a_merged_model_has_them_and_a_note_says_so(made, tmp_path):
    base, adapter = made
    merge(adapter, into=base, out=tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == TEMPLATE
    assert not (tmp_path / "merged" / "tokenizer_config.json").exists()
    assert verify(tmp_path / "merged").verified
    notes = plan_merge(load_patch(adapter), into=open_checkpoint(base)).notes
    assert any("chat_template.jinja, tokenizer.json: as saved with the patch" in note for note in notes)


def test_the_models_own_can_be_asked_for(made, tmp_path):
    base, adapter = made
    merge(adapter, into=base, out=tmp_path / "merged", options=MergeOptions(tokenizer="base"))
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not (tmp_path / "merged" / "chat_template.jinja").exists()


def test_the_template_in_a_configuration_that_is_not_copied_is_kept(made, tmp_path):
    base, adapter = made
    (adapter / "chat_template.jinja").unlink()
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": "of the base"}))
    merge(adapter, into=base, out=tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "of the base"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (tokenizer("b", "a"), "other rows for 'b' \\(row 0\\)|other rows for 'a'"),
        (tokenizer(*(f"t{n}" for n in range(40))), "but the model has 31 rows"),
    ],
)
def test_a_tokenizer_that_contradicts_the_model_is_a_question_to_the_user(text, told, made):
    base, adapter = made
    (adapter / "tokenizer.json").write_text(text)
    (refusal,) = plan_merge(load_patch(adapter), into=open_checkpoint(base)).refusals
    assert refusal.where == "--tokenizer"
    assert any(part in refusal.reason for part in told.replace("\\", "").split("|"))
    for whose in ("base", "patch"):
        plan = plan_merge(load_patch(adapter), into=open_checkpoint(base), options=MergeOptions(tokenizer=whose))
        assert plan.refusals == ()


def test_a_link_out_of_the_adapters_folder_is_not_followed(made, tmp_path):
    base, adapter = made
    adapter = adapter.rename(adapter.with_name("final: 'last'"))
    link = adapter / "chat_template.jinja"
    link.unlink()
    (tmp_path / "secret").write_text("secret")
    link.symlink_to(tmp_path / "secret")
    plan = plan_merge(load_patch(adapter), into=open_checkpoint(base))
    assert [refusal.where for refusal in plan.refusals if refusal.reason.startswith("is a link to")] == [str(link)]


def test_a_port_to_another_vocabulary_takes_its_tokenizer_and_keeps_the_template(made, tiny, tmp_path):
    base, adapter = made
    evolved = shutil.copytree(tiny("evolved"), tmp_path / "evolved")
    (evolved / "tokenizer.json").write_text(tokenizer("c", "a", "b"))
    ported = port(adapter, base=base, evolved=evolved, out=tmp_path / "ported")
    assert set(ported.beside) == {"tokenizer.json", "chat_template.jinja"}
    assert json.loads((tmp_path / "ported" / "tokenizer.json").read_text())["model"]["vocab"] == {
        "c": 0,
        "a": 1,
        "b": 2,
    }
    assert plan_merge(ported, into=open_checkpoint(evolved)).refusals == ()
