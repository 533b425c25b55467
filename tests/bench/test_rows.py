import pytest

from bench.rows import Row, Value, evaluate, is_worse, show

LESS = Row("ours / theirs", "contest", "ours", "theirs", "seconds", "ratio", 2, 1)
MORE = Row("theirs / ours", "contest", "theirs", "ours", "seconds", "ratio", 2, 4, larger_is_better=True)
SAME = Row("same", "contest", "ours", "theirs", "digest", "same", 1, 1, larger_is_better=True)


def result(ours, theirs, **facts):
    return {
        "jobs": {
            "ours": {"runs": [{"seconds": number} for number in ours], "facts": facts},
            "theirs": {"runs": [{"seconds": number} for number in theirs], "facts": facts},
        }
    }


def test_a_ratio_is_that_of_the_medians_and_its_range_that_of_the_turns():
    assert evaluate(LESS, result([2.0, 3.0, 8.0], [1.0, 2.0, 2.0])) == Value(1.5, 1.5, 4.0)


def test_where_a_tool_has_fewer_runs_its_median_stands_in():
    assert evaluate(LESS, result([2.0, 3.0, 8.0], [1.0])) == Value(3.0, 2.0, 8.0)


def test_a_difference_takes_off_what_the_other_job_needs():
    row = Row("beyond", "contest", "ours", "theirs", "seconds", "difference", 2, 1)
    assert evaluate(row, result([2.0, 3.0], [1.0, 1.5])) == Value(1.25, 1.0, 1.5)


def test_what_a_job_needs_whatever_it_does_can_be_taken_off_its_part_of_a_ratio():
    row = Row("beyond", "contest", "ours", "theirs", "seconds", "ratio", 2, 1, beyond={"ours": "imports"})
    measured = result([2.0, 3.0, 5.0], [1.0, 1.0, 1.0])
    measured["jobs"]["imports"] = {"runs": [{"seconds": number} for number in (0.5, 1.0)], "facts": {}}
    assert evaluate(row, measured) == Value(2.0, 1.5, 4.25)


def test_a_ratio_of_what_drowned_in_noise_meets_no_limit():
    row = Row("beyond", "contest", "ours", "theirs", "seconds", "ratio", 2, 1, beyond={"ours": "imports"})
    measured = result([2.0], [1.0])
    measured["jobs"]["imports"] = {"runs": [{"seconds": 3.0}], "facts": {}}
    assert not row.meets(evaluate(row, measured).median, row.must)


def test_a_row_is_measured_where_each_of_its_jobs_was():
    row = Row("beyond", "contest", "ours", "theirs", "seconds", "ratio", 2, 1, beyond={"ours": "imports"})
    assert LESS.is_measured({"contest": result([1.0], [1.0])})
    assert not row.is_measured({"contest": result([1.0], [1.0])})
    assert not LESS.is_measured({})


def test_facts_that_differ_are_not_the_same():
    equal = result([1.0], [1.0], digest="a")
    other = {"jobs": {**equal["jobs"], "theirs": {**equal["jobs"]["theirs"], "facts": {"digest": "b"}}}}
    assert (evaluate(SAME, equal).median, evaluate(SAME, other).median) == (1, 0)


@pytest.mark.parametrize(
    ("row", "now", "worse"),
    [
        (LESS, Value(3.0, 2.6, 3.2), True),
        (LESS, Value(3.0, 2.54, 3.2), False),
        (LESS, Value(3.0, 2.4, 3.2), False),
        (LESS, Value(1.0, 0.9, 1.1), False),
        (MORE, Value(1.0, 0.9, 1.4), True),
        (MORE, Value(1.0, 0.9, 1.6), False),
        (MORE, Value(9.0, 8.0, 9.9), False),
    ],
)
def test_a_row_is_worse_where_the_ranges_lie_apart_on_the_bad_side(row, now, worse):
    assert is_worse(row, Value(2.0, 1.5, 2.5), now) is worse


def test_a_value_stands_with_its_unit():
    memory = Row("memory", "contest", "ours", None, "private_bytes", "number", 1, 1)
    assert [show(LESS, 1.234), show(LESS, 272.4), show(memory, 35e6), show(SAME, 0.0)] == [
        "1.23 x",
        "272 x",
        "35 MB",
        "no",
    ]


def test_a_value_may_count_for_each_row_or_beside_a_least_number_of_bytes():
    rate = Row("rate", "contest", "ours", None, "seconds", "number", None, None, per="rows")
    beside = Row("beside", "contest", "ours", "theirs", "seconds", "difference", 2, 1, per="least_bytes")
    facts = {"rows": 4, "least_bytes": 2}
    values = [evaluate(row, result([2.0, 4.0, 8.0], [1.0, 1.0, 1.0], **facts)) for row in (rate, beside)]
    assert values == [Value(1.0, 0.5, 2.0), Value(1.5, 0.5, 3.5)]
    assert [show(row, value.low) for row, value in zip((rate, beside), values, strict=True)] == [
        "2 rows a second",
        "0.5 x",
    ]


def test_a_number_without_a_limit_meets_none():
    row = Row("time", "contest", "ours", None, "seconds", "number", None, None)
    assert not row.meets(0.0, row.must)
