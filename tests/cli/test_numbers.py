"""Numbers as people write them: taken where they are clear, and refused with what to write where they are not."""

import pytest
import typer

from portllm.cli.combine import parse_weights
from portllm.cli.numbers import gigabytes, points, real, share, whole


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (points, " 2 ", 2.0), (points, "2%", 2.0), (points, "2.5 points", 2.5), (points, "2pp", 2.0),
        (points, "0", 0.0), (points, "0.05 points", 0.05), (points, 2.0, 2.0),
        (share, "5 %", 0.05), (share, "0.05", 0.05), (share, "100%", 1.0), (share, 0.95, 0.95),
        (whole(), "1e3", 1000), (whole(), 16, 16), (whole(least=0), "0", 0), (whole(), "9007199254740993", 2**53 + 1),
        (real(), "2e-4", 2e-4), (real(), 3.0, 3.0),
        (gigabytes, "5GB", 5.0), (gigabytes, "5e-1", 0.5), (gigabytes, "500 MB", 0.5), (gigabytes, "1GiB", 1.073741824),
    ],
)  # fmt: skip
def test_a_clear_number_is_taken(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (points, "two", "'two' is not a number of percentage points from 0 to 100, such as 2 or 2%"),
        (points, "nan", "not a number"), (points, "101", "from 0 to 100"), (points, "-1", "from 0 to 100"),
        (points, "1,5", "write 1.5"), (points, "0.02", "For 2 points write 2; if so little is meant, '0.02 points'"),
        (share, "2", "write 2%, or 0.02"), (share, "120%", "from 0 to 1"), (share, "0,5", "write 0.5"),
        (share, "inf", "not a share"),
        (whole(), "16k", "write 16000"), (whole(), "1.5M", "write 1500000"), (whole(), "16,000", "write 16000"),
        (whole(least=2), "1", "whole number of at least 2"), (whole(), "8.5", "not a whole number"),
        (whole(), "inf", "not a whole number"),
        (real(), "1e-3x", "'1e-3x' is not a number"), (real(), "nan", "not a number"),
        (real(least=0), "-1", "at least 0"),
        (gigabytes, "5 boxes", "such as 5, 5GB or 500MB"), (gigabytes, "1e-9", "at least 1 MB"),
        (gigabytes, "", "not a size"),
        (lambda text: parse_weights(text, 2), "1", "must be 2 numbers"),
        (lambda text: parse_weights(text, 2), "1,x", "'x' is not a number"),
    ],
)  # fmt: skip
def test_an_unclear_number_is_refused_with_what_to_write(parse, text, said):
    with pytest.raises(typer.BadParameter) as refused:
        parse(text)
    assert said in refused.value.message
