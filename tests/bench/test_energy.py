import pytest

from bench.energy import Counter, Meter, _processors


def counting(values, **facts):
    values = iter(values)
    return Counter("a counter", lambda: next(values), **facts)


def test_a_meter_adds_up_what_its_counters_count():
    with Meter((counting([5, 7, 12], unit=0.5), counting([0, 1, 1], unit=10.0))) as meter:
        meter.read()
    assert meter.joules == 0.5 * 7 + 10.0


def test_a_counter_that_began_anew_went_on_counting():
    with Meter((counting([90, 10], unit=1.0, span=100),)) as meter:
        pass
    assert meter.joules == 20.0


def test_without_counters_there_is_no_number():
    with Meter(()) as meter:
        pass
    assert meter.joules is None


def test_processor_packages_are_found_and_their_parts_are_not_counted_twice(tmp_path):
    for zone, name in {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:1": "package-1"}.items():
        (tmp_path / zone).mkdir()
        for file, text in {"name": name, "energy_uj": "2500000", "max_energy_range_uj": "262143328850"}.items():
            (tmp_path / zone / file).write_text(text + "\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()  # as where only root may read it
    (counter,) = _processors(tmp_path)
    assert (counter.name, counter.span) == ("package-0 (RAPL)", 262143328850)
    assert counter.read() * counter.unit == pytest.approx(2.5)
