"""The commands that make patches: exit status, what they print, what they write."""

import json

import pytest
import torch
from typer.testing import CliRunner

import portllm.cli.capture  # noqa: F401 (registers its commands)
from portllm.cli.main import app
from portllm.errors import PlanRefusedError
from portllm.patch.adapter_folder import load_patch


def run(*words):
    """What the program prints and its exit status; a refusal is raised, as `main` catches it."""
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture
def models(tiny):
    base = tiny("base", dtype=torch.float32)
    return base, tiny("evolved", of=base, drift=0.05)


def test_a_capture_prints_what_it_keeps_and_what_it_leaves_out(models, tmp_path):
    base, tuned = models
    done = run("capture", "--base", base, "--tuned", tuned, "--rank", 3, "--dense", "drop", "-o", tmp_path / "patch")
    assert done.exit_code == 0
    assert "14 modules, rank 3" in done.stdout
    assert "left out: 6 tensors" in done.stdout
    assert "model.norm.weight: changed by" in done.stdout
    assert len(load_patch(tmp_path / "patch").deltas) == 14


def test_the_json_of_a_capture_accounts_for_every_tensor(models, tmp_path):
    base, tuned = models
    done = run("capture", "--base", base, "--tuned", tuned, "--rank", "3", "-o", tmp_path / "patch", "--json")
    told = json.loads(done.stdout)
    assert len(told["deltas"]) + len(told["values"]) + len(told["left_out"]) + told["n_unchanged"] == 20
    assert all(0 < delta["truncation_residual"] < 1 for delta in told["deltas"].values())


def test_a_dry_run_writes_nothing(models, tmp_path):
    base, tuned = models
    done = run("capture", "--base", base, "--tuned", tuned, "-o", tmp_path / "patch", "--dry-run")
    assert "14 linear weights" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_gives_the_reasons_not_to(models, tmp_path):
    with pytest.raises(PlanRefusedError, match="fingerprint"):
        run("capture", "--base", models[0], "--tuned", models[0], "-o", tmp_path / "patch", "--dry-run")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--adapter", "a", "--tuned", "t"],
        ["--adapter", "a", "--rank", "3"],
        ["--adapter", "a", "--dense", "keep"],
        ["--tuned", "t", "--rank", "0"],
        ["--tuned", "t", "--rank", "many"],
        ["--tuned", "t", "--rank", "3", "--max-rank", "4"],
        ["--tuned", "t", "--dense", "some"],
    ],
)
def test_wrong_usage_of_capture_ends_with_two(words, tmp_path):
    assert run("capture", "--base", "b", "-o", tmp_path / "patch", *words).exit_code == 2


@pytest.fixture
def patches(tiny, tmp_path):
    of = tiny("base", dtype=torch.float32)
    for name, seed in (("one", 1), ("two", 2)):
        adapter = tiny("adapter", of=of, seed=seed)
        assert run("capture", "--base", of, "--adapter", adapter, "-o", tmp_path / name).exit_code == 0
    return tmp_path / "one", tmp_path / "two"


def test_patches_are_combined(patches, tmp_path):
    done = run("combine", *patches, "--weights", "1,-0.5", "-o", tmp_path / "both")
    assert done.exit_code == 0
    assert "14 modules, rank 6 (4), 8 (10)" in done.stdout or "14 modules, rank 8" in done.stdout
    assert load_patch(tmp_path / "both").record.capture.settings["inputs"][1]["weight"] == -0.5


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_the_json_of_combine_says_what_was_cut_off(patches, tmp_path, method):
    done = run(
        "combine", *patches, "--method", method, "--density", 0.5, "--rank", 2, "-o", tmp_path / "both", "--json"
    )
    told = json.loads(done.stdout)
    assert told["record"]["capture"]["settings"]["method"] == f"{method}-density0.5-seed0-rank2"
    assert 0 < told["truncation_residual"] < 1
    assert {delta["rank"] for delta in told["deltas"].values()} == {2}


def test_a_dry_run_of_combine_writes_nothing(patches, tmp_path):
    done = run("combine", *patches, "-o", tmp_path / "both", "--dry-run")
    assert "14" in done.stdout
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--weights", "1"],
        ["--weights", "1,x"],
        ["--weights", "1,inf"],
        ["--method", "ties", "--rank", "auto"],
        ["--method", "dare", "--density", "0"],
        ["--density", "2"],
        ["--rank", "-1"],
    ],
)
def test_wrong_usage_of_combine_ends_with_two(words, tmp_path):
    assert run("combine", "one", "two", "-o", tmp_path / "both", *words).exit_code == 2
