"""Several patches: which folders the arguments stand for, where each one's output goes, and what a failure stops."""

import json
from pathlib import Path

import pytest

from portllm.errors import AdapterFormatError, PatchError
from portllm.patch.adapter_folder import load_patch
from portllm.patch.folders import find_patches, open_each
from tests import models


@pytest.fixture
def team(tmp_path):
    """A folder of two folders that hold a configuration, one that holds none, and a file."""
    for name in ("triage", "billing"):
        (tmp_path / "team" / name).mkdir(parents=True)
        (tmp_path / "team" / name / "adapter_config.json").write_text("{}")
    (tmp_path / "team" / "notes").mkdir()
    (tmp_path / "team" / "readme.md").write_text("")
    return tmp_path / "team"


def test_an_adapter_stands_for_itself_and_its_output_is_the_output(team, tmp_path):
    found = find_patches([team / "triage"])
    assert found.folders == (team / "triage",)
    assert found.outputs(tmp_path / "out") == (tmp_path / "out",)


def test_a_folder_of_adapters_stands_for_these_sorted(team, tmp_path):
    found = find_patches([team])
    assert found.folders == (team / "billing", team / "triage")
    assert found.outputs(tmp_path / "out") == (tmp_path / "out" / "billing", tmp_path / "out" / "triage")


def test_a_folder_of_one_adapter_keeps_its_subfolder_so_that_a_second_one_changes_nothing(team, tmp_path):
    (team / "billing" / "adapter_config.json").unlink()
    found = find_patches([team])
    assert found.folders == (team / "triage",)
    assert found.outputs(tmp_path / "out") == (tmp_path / "out" / "triage",)


def test_an_adapter_with_checkpoints_of_its_training_inside_is_one_patch(team):
    (team / "adapter_config.json").write_text("{}")
    assert find_patches([team]).folders == (team,)


def test_several_arguments_keep_their_order_and_each_gets_a_subfolder(team, tmp_path):
    found = find_patches([team / "triage", team / "billing"])
    assert [path.name for path in found.outputs(tmp_path / "out")] == ["triage", "billing"]


def test_two_patches_of_equal_name_are_refused_with_both_named(team, tmp_path):
    (tmp_path / "other" / "triage").mkdir(parents=True)
    found = find_patches([team, tmp_path / "other" / "triage"])
    with pytest.raises(PatchError) as caught:
        found.outputs(tmp_path / "out")
    assert f"'{team / 'triage'}' and '{tmp_path / 'other' / 'triage'}'" in str(caught.value)


def test_a_patch_of_the_hub_goes_to_a_folder_named_like_its_repository(tmp_path):
    found = find_patches(["org/first@main", "org/second@v2"])
    assert found.outputs(Path("out")) == (Path("out/first"), Path("out/second"))


def test_the_current_folder_has_a_name_too(team, monkeypatch):
    monkeypatch.chdir(team / "triage")
    assert find_patches([".", "../billing"]).outputs(Path("out")) == (Path("out/triage"), Path("out/billing"))


def test_one_that_cannot_be_opened_does_not_stop_the_others(tiny, tmp_path):
    outcomes = open_each(find_patches([tmp_path / "gone", tiny("adapter")]), lambda patch, number: (patch.name, number))
    assert isinstance(outcomes[0].error, AdapterFormatError)
    assert outcomes[0].value is None
    assert (outcomes[1].value, outcomes[1].error) == ((str(tiny("adapter")), 1), None)


def test_a_bug_is_not_an_outcome(tiny):
    with pytest.raises(ZeroDivisionError):
        open_each(find_patches([tiny("adapter")]), lambda patch, number: 1 / number)


def test_adapters_of_one_recipe_are_those_that_are_opened_alone(tmp_path):
    base = models.make_base(tmp_path / "base")
    recipes = [{}, {}, {"lora_alpha": 12}, {"target_modules": ["q_proj"]}, {}]
    folders = [models.make_adapter(base, tmp_path / f"{n}", seed=n, **how) for n, how in enumerate(recipes)]
    opened = open_each(find_patches(folders), lambda patch, _: patch)
    assert [outcome.value for outcome in opened] == [load_patch(folder) for folder in folders]


def test_a_rank_that_is_no_number_is_refused_after_one_that_is(tmp_path):
    base = models.make_base(tmp_path / "base")
    folders = [models.make_adapter(base, tmp_path / f"{n}", r=1) for n in range(2)]
    config = folders[1] / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": True}))
    good, bad = open_each(find_patches(folders), lambda patch, _: patch)
    assert good.error is None
    assert isinstance(bad.error, AdapterFormatError)
