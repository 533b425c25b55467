"""Model cards: the hub reads their metadata, the user's part goes along, and they say nothing of the machine."""

import json

import pytest
from huggingface_hub import ModelCard
from msgspec import structs

import portllm
from portllm.errors import CheckpointError
from portllm.patch.adapter_folder import load_patch
from portllm.patch.card import END, START, add_result, parse_card, write_patch_card
from portllm.patch.record import ModelIdentity
from tests import models

OWN = """---
license: llama3.1
license_name: llama
tags:
- legal
- base_model:adapter:old/base
base_model: old/base
datasets: [team/contracts]
model-index:
- name: contracts
  results: []
---

# Contracts

Trained on our own contracts.
"""


@pytest.fixture
def adapter(tiny, tmp_path):
    """An adapter with a card of its own."""
    folder = models.make_adapter(tiny("base"), tmp_path / "adapter")
    (folder / "README.md").write_text(OWN)
    return folder


def card(folder):
    return (folder / "README.md").read_text()


def metadata(folder):
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_every_output_that_people_share_has_a_card_that_the_hub_reads(tiny, adapter, tmp_path):
    base, evolved = tiny("base"), tiny("evolved")
    patch = portllm.capture(adapter, base=base, out=tmp_path / "patch")
    tuned = portllm.capture(tuned=evolved, base=base, out=tmp_path / "tuned", rank=2)
    ported = portllm.port(patch, evolved=evolved, out=tmp_path / "ported")
    portllm.combine([patch, patch], out=tmp_path / "combined")
    portllm.merge(ported, into=evolved, out=tmp_path / "merged")
    portllm.export(ported, runtime="vllm", base=evolved, out=tmp_path / "vllm")
    assert tuned.record.files  # of which the card is none
    for name in ("patch", "tuned", "ported", "combined", "merged", "vllm"):
        assert metadata(tmp_path / name)["library_name"] == ("transformers" if name == "merged" else "peft")
        assert "portllm" in metadata(tmp_path / name)["tags"]
        assert card(tmp_path / name).count(START) == card(tmp_path / name).count(END) == 1
        assert str(tmp_path) not in card(tmp_path / name)
    assert "method | verdict" in card(tmp_path / "ported")
    assert "gain of the patch that rounding kept" in card(tmp_path / "merged")
    assert "vllm serve" in card(tmp_path / "vllm")


def test_what_a_user_wrote_goes_along_and_what_named_the_old_base_does_not(tiny, adapter, tmp_path):
    portllm.capture(adapter, base=tiny("base"), out=tmp_path / "patch")
    mine = card(tmp_path / "patch") + "\nMeasured by hand.\n"
    (tmp_path / "patch" / "README.md").write_text(mine)
    portllm.port(tmp_path / "patch", evolved=tiny("evolved"), out=tmp_path / "ported")
    portllm.merge(tmp_path / "ported", into=tiny("evolved"), out=tmp_path / "merged")
    for name in ("patch", "ported", "merged"):
        found = metadata(tmp_path / name)
        assert (found["license"], found["license_name"], found["datasets"]) == ("llama3.1", "llama", ["team/contracts"])
        assert found["tags"][0] == "legal"
        assert not any(tag.startswith("base_model") for tag in found["tags"])
        assert "base_model" not in found
        text = card(tmp_path / name)
        assert text.index("Trained on our own contracts.") < text.index(START)
        assert text.count("# Contracts") == 1
    assert "Measured by hand." in card(tmp_path / "merged").partition(END)[2]


def test_pefts_template_that_nobody_filled_in_is_not_kept(tiny, tmp_path):
    adapter = models.make_adapter(tiny("base"), tmp_path / "adapter", card=True)
    assert "[More Information Needed]" in card(adapter)
    portllm.capture(adapter, base=tiny("base"), out=tmp_path / "patch")
    assert "More Information Needed" not in card(tmp_path / "patch")


def test_the_license_of_the_base_is_carried_over(tiny, tmp_path):
    base = models.make_base(tmp_path / "base")
    (base / "README.md").write_text(
        "---\nlicense: gemma\nlicense_link: https://ai.google.dev/gemma/terms\n---\n# Base\n"
    )
    portllm.capture(models.make_adapter(base, tmp_path / "adapter"), base=base, out=tmp_path / "patch")
    found = metadata(tmp_path / "patch")
    assert (found["license"], found["license_link"]) == ("gemma", "https://ai.google.dev/gemma/terms")


def test_a_base_of_the_hub_is_named_with_its_commit(tiny, tmp_path):
    portllm.capture(tiny("adapter"), base=tiny("base"), out=tmp_path / "patch")
    patch = load_patch(tmp_path / "patch")
    commit = "0123456789abcdef0123456789abcdef01234567"
    identity = ModelIdentity("org/model@main", patch.record.base.fingerprint, None, commit)
    write_patch_card(tmp_path / "patch", patch, structs.replace(patch.record, base=identity), own=None)
    found = metadata(tmp_path / "patch")
    assert (found["base_model"], found["base_model_relation"]) == ("org/model", "adapter")
    assert found["base_model_revision"] == commit
    assert f"revision='{commit}'" in card(tmp_path / "patch")


def test_a_card_can_be_edited_and_the_patch_still_verifies(tiny, tmp_path):
    portllm.capture(tiny("adapter"), base=tiny("base"), out=tmp_path / "patch")
    (tmp_path / "patch" / "README.md").write_text("# Mine\n")
    assert portllm.verify(tmp_path / "patch").verified


@pytest.mark.parametrize("text", ["", "---\n", "---\nno end", "---\n---\n", "- a list\n", START, f"{END}{START}", "\0"])
def test_any_text_is_taken_for_a_card(text):
    assert isinstance(parse_card(text).above, str)


def test_a_link_out_of_the_folder_is_not_copied(tiny, tmp_path):
    adapter = models.make_adapter(tiny("base"), tmp_path / "adapter")
    (tmp_path / "secret").write_text("the password")
    (adapter / "README.md").unlink()
    (adapter / "README.md").symlink_to(tmp_path / "secret")
    portllm.capture(adapter, base=tiny("base"), out=tmp_path / "patch")
    assert "password" not in card(tmp_path / "patch")


def test_names_cannot_break_out_of_their_cell(tiny, tmp_path):
    base = models.make_base(tmp_path / "a`|<b>")
    portllm.capture(models.make_adapter(base, tmp_path / "adapter"), base=base, out=tmp_path / "patch")
    lines = [line for line in card(tmp_path / "patch").splitlines() if line.startswith("| base |")]
    assert lines[0].startswith("| base | `a'/<b>`")
    assert json.dumps("a`|<b>") in card(tmp_path / "patch")


def test_a_result_is_added_to_the_card_once_and_stays_with_what_was_measured(tiny, adapter, tmp_path):
    portllm.capture(adapter, base=tiny("base"), out=tmp_path / "patch")
    own = "\nMeasured by hand.\n"
    (tmp_path / "patch" / "README.md").write_text(card(tmp_path / "patch") + own)
    for command, found in (
        ("prove: a", "Not proven."),
        ("certify: rows", "At most | 2 points."),
        ("prove: a", "Proven."),
    ):
        add_result(tmp_path / "patch", command, found)

    said = card(tmp_path / "patch")
    assert [line for line in said.splitlines() if ": " in line and line.startswith("| `") and "|" in line[3:]][-2:] == [
        "| `certify: rows` | At most / 2 points. |",
        "| `prove: a` | Proven. |",
    ]
    assert said.index(START) < said.index("## Results") < said.index("Proven.") < said.index(END) < said.index(own)
    assert portllm.verify(tmp_path / "patch").verified
    portllm.port(tmp_path / "patch", evolved=tiny("evolved"), out=tmp_path / "ported")
    assert "## Results" not in card(tmp_path / "ported")
    assert own in card(tmp_path / "ported")


def test_a_result_is_not_added_to_a_card_that_this_program_has_not_written(adapter):
    with pytest.raises(CheckpointError, match="no model card to which a result can be added"):
        add_result(adapter, "prove: a", "Proven.")
    assert card(adapter) == OWN
