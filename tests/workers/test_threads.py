"""Jobs on threads: all are done, their books are kept by one thread, and the first that fails stops the rest."""

import threading

import pytest

from portllm.workers.threads import StoppedError, default_threads, run_side_by_side


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n_jobs", [0, 1, 20])
def test_every_job_is_done_once_and_heard_by_the_thread_that_asked(threads, n_jobs):
    heard, results, keepers = [], [], set()

    def job(number, tell):
        tell(number)
        tell(100 + number)
        return number

    def told(number):
        keepers.add(threading.get_ident())
        heard.append(number)

    jobs = ((lambda tell, number=number: job(number, tell)) for number in range(n_jobs))
    run_side_by_side(jobs, threads=threads, told=told, done=results.append)
    assert sorted(results) == list(range(n_jobs))
    assert sorted(heard) == [*range(n_jobs), *range(100, 100 + n_jobs)]
    assert keepers <= {threading.get_ident()}


def test_no_more_jobs_are_begun_than_can_wait_in_line():
    begun, done = [], []

    def jobs():
        for number in range(50):
            begun.append(number)
            assert len(begun) - len(done) <= 6
            yield lambda tell, number=number: number

    run_side_by_side(jobs(), threads=2, told=print, done=done.append)
    assert len(done) == 50


def test_the_first_failure_stops_the_others_where_they_next_tell_and_is_raised():
    failed = threading.Event()
    stopped = []

    def fail(tell):
        failed.set()
        raise KeyError("first")

    def go_on(tell):
        failed.wait()
        try:
            while True:
                tell(1)
        except StoppedError:
            stopped.append(True)
            raise

    with pytest.raises(KeyError, match="first"):
        run_side_by_side([fail, go_on], threads=2, told=lambda number: None, done=print)
    assert stopped == [True]


def test_an_error_of_who_keeps_the_books_stops_the_jobs_too():
    stopped = []

    def go_on(tell):
        try:
            while True:
                tell(1)
        except StoppedError:
            stopped.append(True)

    def interrupt(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_side_by_side([go_on], threads=1, told=interrupt, done=print)
    assert stopped == [True]


def test_there_is_a_thread_for_each_processor_and_a_bound():
    assert 1 <= default_threads() <= 8


@pytest.mark.parametrize("said", ["1", "0", "100", "4,2"])
def test_who_shares_a_machine_says_so_and_gets_no_more(monkeypatch, said):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    alone = default_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert default_threads() == (1 if said in ("0", "1") else alone)
