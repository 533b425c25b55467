"""Numbers as people write them; where it is not clear which one is meant, the message says what to write."""

import math
import re
from collections.abc import Callable

import typer

UNITS = {"": 1.0, "gb": 1.0, "g": 1.0, "mb": 1e-3, "m": 1e-3, "tb": 1e3, "gib": 1.073741824, "mib": 1.048576e-3}
"""Gigabytes in a unit of size, by its name in small letters."""

LEAST_POINTS = 0.1
"""A limit below it is rather a fraction that was meant as points, unless the unit is written."""

_SHORT = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmM])")
_GROUPED = re.compile(r"\d{1,3}([,' ]\d{3})+")
_SIZE = re.compile(r"([\d.,eE+-]*\d[.,]?)\s*([a-zA-Z]*)")
_POINTS = re.compile(r"\s*(%|points?|pp|pts?\.?)$", re.IGNORECASE)

Whole = Callable[[int | str], int]
Number = Callable[[float | str], float]


def whole(*, least: int = 1) -> Whole:
    """A parser of whole numbers.

    Example:
        >>> whole()("16"), whole()("1e3"), whole(least=0)("0")
        (16, 1000, 0)
    """

    def number(given: int | str) -> int:
        text = str(given).strip()
        value = _float(text)
        if value is not None and value == int(value) and value >= least:
            return int(text) if text.isdecimal() else int(value)
        short, meant = _SHORT.fullmatch(text), ""
        if short is not None:
            meant = f": write {float(short[1]) * {'k': 1e3, 'm': 1e6}[short[2].lower()]:.0f}"
        elif _GROUPED.fullmatch(text):
            meant = f": write {re.sub('[^0-9]', '', text)}"
        raise typer.BadParameter(f"'{given}' is not a whole number of at least {least}{meant}.")

    return number


def real(*, least: float = -math.inf) -> Number:
    """A parser of finite numbers.

    Example:
        >>> real()("2e-4")
        0.0002
    """

    def number(given: float | str) -> float:
        value = _float(str(given))
        if value is None or value < least:
            bound = "" if least == -math.inf else f" of at least {least:g}"
            raise typer.BadParameter(f"'{given}' is not a number{bound}{_with_point(str(given))}.")
        return value

    return number


def share(given: float | str) -> float:
    """A part of a whole, as a fraction or in percent.

    Example:
        >>> share("0.02"), share("2%"), share("2 %")
        (0.02, 0.02, 0.02)
    """
    text = str(given).strip()
    value = _float(text.removesuffix("%").strip())
    if value is not None and text.endswith("%"):
        value = float(f"{value / 100:.15g}")
    if value is not None and 0 <= value <= 1:
        return value
    if value is not None and 1 < value <= 100 and not text.endswith("%"):
        raise typer.BadParameter(
            f"'{given}' is more than the whole: write {value:g}%, or {value / 100:g} as a fraction."
        )
    raise typer.BadParameter(f"'{given}' is not a share from 0 to 1, such as 0.02 or 2%{_with_point(text)}.")


def points(given: float | str) -> float:
    """Percentage points of accuracy.

    Example:
        >>> points("2"), points("2%"), points("0.05 points")
        (2.0, 2.0, 0.05)
    """
    text = str(given).strip()
    bare = _POINTS.sub("", text)
    value = _float(bare)
    if value is None or not 0 <= value <= 100:
        raise typer.BadParameter(
            f"'{given}' is not a number of percentage points from 0 to 100, such as 2 or 2%{_with_point(bare)}."
        )
    if 0 < value < LEAST_POINTS and bare == text:
        raise typer.BadParameter(
            f"'{given}' is a limit of {value:g} percentage points. For {value * 100:g} points write {value * 100:g}; "
            f"if so little is meant, '{value:g} points'."
        )
    return value


def gigabytes(given: float | str) -> float:
    """A size, in GB where no unit is written.

    Example:
        >>> gigabytes("5"), gigabytes("5GB"), gigabytes("500 MB")
        (5.0, 5.0, 0.5)
    """
    found = _SIZE.fullmatch(str(given).strip())
    value = None if found is None else _float(found[1])
    unit = "" if found is None else found[2].lower()
    if value is None or unit not in UNITS or value * UNITS[unit] < 1e-3:
        raise typer.BadParameter(f"'{given}' is not a size of at least 1 MB, such as 5, 5GB or 500MB.")
    return value * UNITS[unit]


def _float(text: str) -> float | None:
    """A finite number; None where the text is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _with_point(text: str) -> str:
    """How a number with a comma is to be written."""
    return f": write {text.replace(',', '.')}" if re.fullmatch(r"\d+,\d+", text.removesuffix("%").strip()) else ""


for _named in (share, points, gigabytes):
    _named.__name__ = "number"  # what help shows for the value
