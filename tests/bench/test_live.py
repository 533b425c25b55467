"""What runs models: the rows find their jobs, the clock tells what it was told, the page says what was recorded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import live_contests
from bench.live_contests import CONTESTS
from bench.live_inputs import TASKS, LiveInputs
from bench.live_page import files
from bench.live_rows import ROWS
from bench.peers.environment import peer_version, version

ROOT = Path(__file__).parents[2]


@pytest.fixture
def inputs(tmp_path):
    inputs = LiveInputs(tmp_path, None, 2)
    for file in (*map(inputs.rows, TASKS), inputs.prompts):
        file.parent.mkdir(exist_ok=True)
        file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    return inputs


def test_every_row_is_about_jobs_of_its_contest(inputs, monkeypatch):
    monkeypatch.setattr(live_contests, "install", lambda _, work: work)
    jobs = {name: {job.name for job in contest(inputs).jobs} for name, contest in CONTESTS.items()}
    assert {row.contest for row in ROWS} == set(jobs)
    for row in ROWS:
        assert {row.of, row.by or row.of} <= jobs[row.contest], row.title


def test_a_step_is_timed_from_the_end_of_the_one_before(tmp_path):
    events = [["train", 0, 3, "steps", 0.0, 1.0]]
    events += [["train: loss 1.0", n, 3, "steps", 0.0, end] for n, end in ((1, 9.0), (2, 10.0), (3, 12.0))]
    (tmp_path / "events.json").write_text(json.dumps(events))
    assert live_contests._our_steps(tmp_path) == {"step_seconds": 1.5}


def test_the_refit_is_timed_from_what_was_done_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(live_contests, "least_bytes", lambda *_: 5)
    events = [
        ["write answers", 1, 1, "steps", 2.0, 3.0],
        *(["align, refit 1 of up to 4", n, 2, "steps", 2.0 + n, 3.0 + 2 * n] for n in (1, 2)),
    ]
    (tmp_path / "events.json").write_text(json.dumps(events))
    found = live_contests._refit(tmp_path, tmp_path, tmp_path)
    assert found == {"pass_seconds": 4.0, "pass_cpu_seconds": 2.0, "least_bytes": 5}


def test_a_peer_is_pinned(tmp_path):
    assert peer_version("trl")
    pins = tmp_path / "pins.txt"
    pins.write_text("# torch==1\na==2\n")
    assert (version("a", pins), version("torch", pins)) == ("2", None)


def test_the_page_and_the_picture_say_what_was_recorded():
    results = ROOT / "bench" / "results"
    assert {name: (results / name).read_text() for name in files(results)} == files(results)


@pytest.mark.slow
def test_a_command_is_clocked_and_exits_as_it_would(tmp_path):
    report = tmp_path / "report" / "events.json"
    command = [
        sys.executable,
        ROOT / "bench" / "clocked.py",
        report,
        "check",
        "nowhere",
        "--base",
        "a",
        "--evolved",
        "b",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(report.read_text())) == (1, [])
    assert "nowhere" in done.stderr
