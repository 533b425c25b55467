import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.inputs import Inputs, NoRoomError
from bench.page import files
from bench.rows import ROWS
from bench.session import Session
from bench.shapes import SHAPES
from bench.speed import fallen_behind, measure_shape
from portllm.checkpoint.model.identity import digest
from portllm.checkpoint.open import open_checkpoint

ROOT = Path(__file__).parents[2]
CONTESTS = ("copy", "merge", "drift", "port", "check")  # all that need no program of others to be installed


def run(tmp_path, *arguments):
    places = ("--work", tmp_path / "work", "--results", tmp_path / "results")
    command = [sys.executable, "-m", "bench.speed", "--shapes", "tiny", "--runs", "1", *places, *arguments]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Inputs(SHAPES["tiny"], tmp_path_factory.mktemp("tiny"))


def test_the_same_shape_makes_the_same_bytes(tiny, tmp_path):
    again = Inputs(tiny.shape, tmp_path)
    assert digest(open_checkpoint(str(tiny.base))) == digest(open_checkpoint(str(again.base)))


def test_the_models_of_a_shape_differ_by_the_patch_and_by_the_drift(tiny):
    from bench.synthetic import DRIFT, LARGEST_DELTA, SMALLEST_DELTA
    from portllm.checking.update.drift import measure_drift

    base, tuned, evolved = (open_checkpoint(str(folder)) for folder in (tiny.base, tiny.tuned, tiny.evolved))
    deltas = measure_drift(base, tuned).tensors
    for module in tiny.shape.modules:
        assert 0.7 * SMALLEST_DELTA < deltas[f"{module}.weight"].relative < 1.4 * LARGEST_DELTA, module
    assert deltas["model.embed_tokens.weight"].relative == 0
    for name, sums in measure_drift(base, evolved).tensors.items():
        assert sums.relative == pytest.approx(DRIFT, rel=0.5), name


def test_the_adapter_is_the_delta_of_the_tuned_model(tiny):
    from bench.residual import relative_residual

    assert relative_residual(tiny.base, tiny.tuned, tiny.adapter) < 0.6  # the rest is bfloat16's rounding


def test_a_shape_for_which_the_disk_has_no_room_is_refused(tmp_path):
    with pytest.raises(NoRoomError, match="GB are free"):
        Inputs(SHAPES["8b"], tmp_path).require_room(10**18)


def test_what_the_disk_has_no_room_for_is_skipped_with_a_line(tiny, monkeypatch, capsys):
    monkeypatch.setattr("bench.inputs.RESERVE_BYTES", 10**18)
    options = argparse.Namespace(contests=["port"], runs=1, slow_runs=1)
    assert measure_shape(tiny, Session(tiny.folder, peers={}), options) == {}
    assert "tiny: port is skipped" in capsys.readouterr().out


def test_seconds_of_another_machine_are_not_compared_but_memory_is():
    def results(processor, seconds, private):
        runs = [{"seconds": seconds, "private_bytes": private}]
        return {
            "port": {"machine": {"processor": processor, "cores": 2}, "jobs": {"port": {"runs": runs, "facts": {}}}}
        }

    recorded, slow, large = results("a", 1.0, 10), results("b", 9.0, 10), results("b", 1.0, 20)
    assert fallen_behind(ROWS, recorded, slow) == []
    assert len(fallen_behind(ROWS, recorded, results("a", 9.0, 10))) == 1
    assert len(fallen_behind(ROWS, recorded, large)) == 1


def test_the_page_and_the_pictures_say_what_was_recorded():
    results = ROOT / "bench" / "results"
    assert {name: (results / name).read_text() for name in files(results)} == files(results)


@pytest.mark.slow
def test_a_benchmark_is_recorded_and_a_worse_one_fails(tmp_path):
    first = run(tmp_path, "--record", "--contests", *CONTESTS)
    assert first.returncode == 0, first.stdout + first.stderr
    results = tmp_path / "results"
    page = (results / "speed.md").read_text()
    assert "merge and PEFT write the same tensors | yes" in page
    assert (results / "speed-tiny.svg").read_text().startswith("<svg")
    recorded = results / "speed-tiny.json"
    content = json.loads(recorded.read_text())
    assert list(content["contests"]) == list(CONTESTS)

    content["contests"]["port"]["jobs"]["port"]["runs"][0]["private_bytes"] //= 2
    recorded.write_text(json.dumps(content))
    again = run(tmp_path, "--contests", "port")
    assert again.returncode == 1, again.stdout + again.stderr
    assert "WORSE than recorded: tiny: port: private memory" in again.stderr
