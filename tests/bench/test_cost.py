"""What porting costs, on a shape that takes seconds: every job is run, and the page says what the records hold."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.contests import Job
from bench.cost_jobs import Baseline
from bench.cost_page import epoch_seconds, files, render
from bench.room import fitting, free_memory
from bench.shapes import PAPER, SHAPES

ROOT = Path(__file__).parents[2]

MISTRAL = PAPER["mistral-7b"]


def job(label, seconds, private, **facts):
    median = {"seconds": seconds, "private_bytes": private, "resident_bytes": 2 * private}
    runs = {"runs": [median], "median": median, "range": {name: [value, value] for name, value in median.items()}}
    return {"label": label, "is_ours": label.startswith("portllm"), "facts": facts, **runs}


def record(**jobs):
    machine = {
        "processor": "a processor", "cores": 2, "memory_bytes": 2**34, "system": "Linux", "python": "3.11",
        "versions": {"torch": "2"}, "load_before": 0.1, "meters": [],
    }  # fmt: skip
    return {
        "name": "m",
        "like": "a model",
        "n_params": 7,
        "baseline": {"rank": 8, "batch": 100, "tokens": 64, "steps": 3, "device": "cpu", "n_trained": 5},
        "contest": {"title": "cost", "cache": "warm", "machine": machine, "jobs": jobs},
        "skipped": [],
    }


LORA = job("LoRA", 60.0, 8e9, n_trained=5, step_seconds=[2.0, 1.0, 9.0])
PORT = job("portllm port", 4.0, 1e9, n_trained=0)


def test_an_epoch_is_extrapolated_from_the_middle_step():
    assert epoch_seconds(record(lora=LORA)) == 674 * 2.0  # 67,349 rows are 674 batches of 100
    assert epoch_seconds(record(port=PORT)) is None


def test_ratios_are_to_an_epoch_and_to_the_memory_of_fine_tuning():
    page = render({"m": record(lora=LORA, port=PORT)})
    assert "| an epoch of SST-2, extrapolated: 674 steps | | | 22.5 min |" in page
    assert "| portllm port | 1 | 0 | 4.00 s | 1,000 MB | 2,000 MB |  |  | not told | 337 x | 8.0 x |" in page


def test_memory_of_a_gpu_counts_beside_that_of_the_process():
    on_gpu = job(
        "LoRA", 60.0, 2e9, n_trained=5, cuda_allocated_bytes=17e9, cuda_reserved_bytes=18e9, step_seconds=[1.0]
    )
    measured = record(lora=on_gpu, port=PORT)
    page = render({"m": {**measured, "baseline": {**measured["baseline"], "device": "cuda"}}})
    assert "| 17,000 MB | 18,000 MB |" in page
    assert page.count("| 20.0 x |") == 1


def test_where_fine_tuning_was_skipped_nothing_is_compared_with_it():
    page = render({"m": {**record(port=PORT), "skipped": ["LoRA: needs more"]}})
    assert "Skipped: LoRA: needs more." in page
    assert "not told |  |  |" in page


def test_energy_that_was_told_stands_in_the_table():
    told = {**PORT, "median": {**PORT["median"], "joules": 1234.5}}
    assert "| 1,234 J |" in render({"m": record(port=told)})


def test_the_memory_of_fine_tuning_is_asked_for_before_it_begins():
    baseline = Baseline()
    weights = 2 * MISTRAL.n_params
    assert weights < baseline.memory(MISTRAL) < weights + 3e9
    large = Job("lora", "LoRA", (), (), memory=("cpu", 10**18))
    small = replace(large, label="port", memory=("cpu", 0))
    jobs, lines = fitting([large, small])
    assert jobs == (small,)
    assert lines[0].startswith("LoRA: needs about 1000000000.0 GB of memory, ")
    assert 0 < free_memory("cpu") < 10**15


def test_the_page_and_the_pictures_say_what_was_recorded():
    results = ROOT / "bench" / "results"
    assert files(results)
    assert {name: (results / name).read_text() for name in files(results)} == files(results)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "gemma2-9b"])
def test_every_job_is_measured_and_the_models_are_removed(tmp_path, name):
    places = ("--work", tmp_path / "work", "--results", tmp_path / "results")
    few = ("--steps", "2", "--batch", "2", "--tokens", "8", "--runs", "1")
    program = f"""
import sys
from dataclasses import replace
from bench import cost
gemma = cost.CHOICES["gemma2-9b"]
cost.CHOICES["gemma2-9b"] = replace(gemma, hidden=64, layers=2, inner=96, head_width=8, vocabulary=99)
sys.argv = ["cost", "--shapes", {name!r}, *{[str(part) for part in (*places, *few)]!r}]
cost.main()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads((tmp_path / "results" / f"cost-{name}.json").read_text())
    jobs = measured["contest"]["jobs"]
    assert list(jobs) == ["lora", "port", "merge", "peft", "load"]
    assert jobs["lora"]["facts"]["n_trained"] == measured["baseline"]["n_trained"]
    assert len(jobs["lora"]["facts"]["step_seconds"]) == 2
    assert jobs["lora"]["facts"]["dtype"] == "bfloat16"
    assert jobs["load"]["facts"]["n_params"] == measured["n_params"]
    assert (tmp_path / "results" / f"cost-{name}.svg").exists()
    assert not (tmp_path / "work" / "cost" / name).exists()
    if name == "tiny":
        assert measured["n_params"] == SHAPES["tiny"].n_params
