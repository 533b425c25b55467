"""A session that was cut off goes on with the runs that it has."""

import sys

import pytest

from bench.contests import Contest, Job
from bench.inputs import OUTPUTS
from bench.session import Session


def test_a_session_that_was_cut_off_can_end_with_fewer_runs_and_has_what_they_found_out(tmp_path, monkeypatch):
    file = tmp_path / OUTPUTS / "number"
    program = f"open({str(file)!r}, 'w').write('7')"
    job = Job("job", "a job", (sys.executable, "-c", program), (), file, lambda at: {"n": at.read_text()})
    run, calls = Session._run, []

    def cut_off(*arguments, **how):
        calls.append(arguments)
        if len(calls) == 3:  # the first brings the program into the page cache
            raise KeyboardInterrupt
        return run(*arguments, **how)

    monkeypatch.setattr(Session, "_run", cut_off)
    contest = Contest("a contest", (job,))
    with pytest.raises(KeyboardInterrupt):
        Session(tmp_path, peers={}).measure("one", contest, runs=2, slow_runs=2)
    found = Session(tmp_path, peers={}).measure("one", contest, runs=1, slow_runs=1)["jobs"]["job"]
    assert len(calls) == 3
    assert len(found["runs"]) == 1
    assert found["facts"] == {"n": "7"}
