"""merge as a user calls it in place, and back; merging into another folder is in test_patch_commands.py."""

import json
import shutil

import pytest

from tests.safetensors_files import contents


@pytest.fixture
def model(tiny, tmp_path):
    return shutil.copytree(tiny("base"), tmp_path / "model")


def test_a_merge_in_place_says_how_to_take_it_back_and_is_taken_back(portllm, tiny, model):
    before = contents(model)
    merged = portllm("merge", tiny("adapter"), "--into", model, "--in-place")
    assert merged.status == 0, merged.err
    assert f"portllm merge --undo {model}" in merged.out
    assert "overwritten in place: 14 tensors" in merged.out
    undone = portllm("merge", "--undo", model)
    assert (undone.status, contents(model)) == (0, before)
    assert "14 tensors" in undone.out


def test_a_dry_run_says_how_much_room_the_way_back_needs_and_writes_nothing(portllm, tiny, model):
    before = contents(model)
    told = portllm("merge", tiny("adapter"), "--into", model, "--in-place", "--dry-run")
    assert told.status == 0, told.err
    n_bytes = 2 * 2 * sum(rows * columns for rows, columns in ((18, 12), (6, 12), (6, 12), (12, 18), *3 * [(20, 12)]))
    assert f"in place: overwrites {n_bytes / 1000:.1f} kB" in told.out
    assert contents(model) == before


def test_both_results_as_json(portllm, tiny, model):
    merged = json.loads(portllm("merge", tiny("adapter"), "--into", model, "--in-place", "--json", "--quiet").out)
    assert merged["merged_in_place"] is True
    assert json.loads(portllm("merge", "--undo", model, "--json", "--quiet").out)["tensors_restored"] == 14


@pytest.mark.parametrize(
    "arguments",
    [
        ["ADAPTER", "--into", "MODEL"],
        ["ADAPTER", "--into", "MODEL", "-o", "OUT", "--in-place"],
        ["ADAPTER", "--in-place"],
        ["--into", "MODEL", "--in-place"],
        ["ADAPTER", "--into", "MODEL", "--in-place", "--dtype", "F32"],
        ["ADAPTER", "--into", "MODEL", "--in-place", "--overwrite"],
        ["ADAPTER", "ADAPTER", "--into", "MODEL", "--in-place"],
        ["ADAPTER", "--undo", "MODEL"],
        ["--undo", "MODEL", "--in-place"],
        [],
    ],
)
def test_arguments_that_say_nothing_together_are_wrong_usage(arguments, portllm, tiny, model, tmp_path):
    before = contents(model)
    places = {"ADAPTER": tiny("adapter"), "MODEL": model, "OUT": tmp_path / "out"}
    assert portllm("merge", *[places.get(word, word) for word in arguments]).status == 2
    assert contents(model) == before


def test_several_patches_go_each_into_weights_of_their_own(portllm, tiny, tmp_path):
    team = tmp_path / "team"
    for name, seed in (("first", 1), ("second", 2)):
        shutil.copytree(tiny("adapter", seed=seed), team / name)
    result = portllm("merge", team, "--into", tiny("base"), "-o", tmp_path / "all", "--quiet")
    assert result.status == 0, result.err
    assert "Merged 2 of 2 patches" in result.out
    for name in ("first", "second"):
        portllm("merge", team / name, "--into", tiny("base"), "-o", tmp_path / "alone" / name, "--quiet")
    assert contents(tmp_path / "all") == contents(tmp_path / "alone")


def test_one_of_several_that_fails_does_not_stop_the_others(portllm, tiny, tmp_path):
    good, bad = tiny("adapter"), shutil.copytree(tiny("adapter"), tmp_path / "bad")
    (bad / "adapter_config.json").write_text("{}")
    arguments = ["merge", bad, good, "--into", tiny("base"), "-o", tmp_path / "out", "--quiet"]
    told = portllm(*arguments, "--dry-run")
    assert (told.status, (tmp_path / "out").exists()) == (1, False)
    assert "Would merge 1 of 2 patches" in told.out
    result = portllm(*arguments, "--json")
    failed, merged = json.loads(result.out)
    assert (result.status, failed["patch"]) == (1, str(bad))
    assert "error" in failed
    assert merged["manifest"]["tensors_changed"] == 14


def test_taking_back_what_was_not_done_is_refused(portllm, model):
    result = portllm("merge", "--undo", model)
    assert result.status == 1
    assert "there is no in-place merge to undo" in result.err


@pytest.mark.parametrize("name", ["F32", "float32", "fp32", "torch.float32"])
def test_a_dtype_may_have_the_name_it_has_in_torch(name, portllm, tiny, tmp_path):
    done = portllm("merge", tiny("adapter"), "--into", tiny("base"), "--dtype", name, "-o", tmp_path / "merged")
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"


def test_a_dtype_that_weights_are_not_stored_in_is_wrong_usage(portllm, tiny, tmp_path):
    done = portllm("merge", tiny("adapter"), "--into", tiny("base"), "--dtype", "int8", "-o", tmp_path / "merged")
    assert done.status == 2
    assert "unknown dtype 'int8'; expected one of F64, F32, F16, BF16" in " ".join(done.err.split())
