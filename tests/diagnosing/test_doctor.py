"""What `doctor` finds on a machine, and what it calls a problem."""

import json
from dataclasses import replace

import pytest

from portllm import doctor
from portllm.diagnosing import doctor as room
from portllm.diagnosing.text import doctor_to_json, render_doctor
from portllm.diagnosing.trial import try_all
from portllm.installed import Needed


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Of a machine with a cache of its own and one GPU."""
    monkeypatch.setenv("PORTLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "digests").mkdir(parents=True)
    (tmp_path / "cache" / "digests" / "a.json").write_bytes(b"x" * 1500)
    (tmp_path / "cache" / "digests" / "link").symlink_to("/etc")
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (tmp_path / "gpus" / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 17\n")
    monkeypatch.setattr(room, "DRIVERS", tmp_path / "gpus")
    return doctor()


def test_a_cache_is_measured_without_following_links(report):
    sizes = {cache.name: cache.n_bytes for cache in report.caches}
    assert sizes["built-in models"] == 0
    assert 1500 <= sizes["digests of models"] < 1600


def test_a_gpu_that_the_driver_knows_is_named(report):
    assert report.gpus == ("NVIDIA H200",)


def test_what_torch_was_built_for_is_what_torch_says():
    import torch

    built_for = doctor().torch_built_for
    assert built_for == (f"cuda {torch.version.cuda}" if torch.version.cuda else "cpu")


def test_a_gpu_that_torch_cannot_use_is_a_problem(report):
    assert [text.split(":")[0] for text in replace(report, torch_built_for="cpu").problems] == ["NVIDIA H200"]
    assert replace(report, torch_built_for="cuda 13.0").problems == ()


def test_a_needed_package_that_is_missing_or_too_old_is_a_problem_with_its_remedy(report):
    packages = (Needed("numpy>=2", "1.26", suits=False), Needed("torch>=2.6", "2.7", suits=True))
    found = replace(report, gpus=(), packages=packages)
    assert found.problems == ("numpy>=2: not installed in a version that suits. Run: pip install 'numpy>=2'",)
    assert render_doctor(found).startswith("Not well: 1 problem.\n  - numpy>=2: not installed")
    assert "NO  numpy>=2    1.26" in render_doctor(found)


def test_an_extra_is_installed_when_all_of_it_is(report):
    there, old = Needed("a", "2", suits=True), Needed("b>=2", "1", suits=False)
    assert [replace(report.extras[0], packages=found).is_installed for found in ((there,), (there, old), ())] == [
        True, False, False,
    ]  # fmt: skip


def test_the_token_is_never_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    report = doctor()
    assert report.token == "HF_TOKEN"
    assert "hf_secret" not in render_doctor(report) + json.dumps(doctor_to_json(report)) + repr(report)


def test_what_is_tried_works_here():
    trials = list(try_all(live=True))
    assert [trial.name for trial in trials if not trial.works] == []
    assert [trial.name for trial in trials][:2] == ["torch", "cpu"]


def test_what_is_not_installed_is_not_tried():
    assert [trial.name for trial in try_all(live=False) if "transformers" in trial.name] == []


def test_what_fails_when_it_is_tried_is_a_problem(report, monkeypatch):
    import torch

    def broken(*_):
        raise RuntimeError("CUDA error: out of order\nmore lines")

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    failed = next(trial for trial in try_all(live=False) if trial.name == "cpu")
    assert replace(report, gpus=(), trials=(failed,)).problems == ("cpu: cannot compute: CUDA error: out of order",)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_the_command_shows_the_report(portllm, options):
    told = portllm("doctor", *options)
    assert told.status in (0, 3)
    if options:
        assert json.loads(told.out)["version"]
    else:
        assert told.out.startswith(("Well: ", "Not well: "))
