import sys

import pytest

from bench.measure import measure

HELD = 60_000_000


def python(code):
    return (sys.executable, "-c", code)


def hold(n_bytes):
    """Code that has so many bytes of its own for long enough to be seen."""
    return f"x = b'a' * {n_bytes}; import time; time.monotonic() + sum(range(10_000_000))"


def test_private_memory_is_what_the_process_holds():
    without, held = measure(python(hold(1))), measure(python(hold(HELD)))
    assert held.private_bytes - without.private_bytes == pytest.approx(HELD, rel=0.1)


def test_memory_that_could_be_shared_is_private_too():
    fill = f"[x.write(b'a' * 4096) for _ in range({HELD} // 4096)]"
    code = f"import mmap; x = mmap.mmap(-1, {HELD}); {fill}; sum(range(10_000_000))"
    assert measure(python(code)).private_bytes > HELD


def test_the_memory_of_a_child_counts():
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold(HELD)!r}], check=True)"
    assert measure(python(child)).private_bytes > HELD


def test_processor_time_is_taken_from_the_process():
    run = measure(python("sum(range(10_000_000))"))
    assert run.cpu_seconds > 0


def test_a_command_that_fails_ends_the_benchmark_with_what_it_said():
    with pytest.raises(SystemExit, match="no such luck"):
        measure(python("raise RuntimeError('no such luck')"))
