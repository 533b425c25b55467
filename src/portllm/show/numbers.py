"""Numbers in the words of tables, terminal and page alike: the library's numbers are shares and stay whole. Pure."""

import math


def percent(share: float, *, digits: int = 1) -> str:
    """A share in percent.

    Example:
        >>> percent(0.8512)
        '85.1 %'
    """
    return f"{100 * share:.{digits}f} %"


def upper_percent(share: float) -> str:
    """A bound in percent, rounded up: what is shown still holds.

    Example:
        >>> upper_percent(0.0256012), upper_percent(0.01), upper_percent(1.0)
        ('2.57 %', '1.00 %', '100.00 %')
    """
    return f"{min(math.ceil(share * 10_000 - 1e-9) / 100, 100):.2f} %"


def upper_points(share: float) -> str:
    """A bound in percentage points, rounded up likewise.

    Example:
        >>> upper_points(0.0256012), upper_points(0.01)
        ('2.57', '1.00')
    """
    return upper_percent(share).removesuffix(" %")


def three_digits(value: float) -> str:
    """Three significant digits, zeros at the end with them, so that the numbers of a column can be compared.

    Example:
        >>> [three_digits(value) for value in (1.0, 0.9984, 100.2, 1487.0, 0.0)]
        ['1.00', '0.998', '100', '1,487', '0']
    """
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:#.3g}".removesuffix(".") if value else "0"


def three_percent(share: float | None) -> str:
    """A share in percent with three significant digits; empty where there is none.

    Example:
        >>> three_percent(0.0123456), three_percent(math.inf), three_percent(None)
        ('1.23 %', 'infinite', '')
    """
    return "" if share is None else "infinite" if math.isinf(share) else f"{three_digits(100 * share)} %"


def points(change: float) -> str:
    """A change of a share in percentage points.

    Example:
        >>> points(-0.0123)
        '-1.2'
    """
    return f"{100 * change:+.1f}"


def n_params(value: int) -> str:
    """A number of parameters.

    Example:
        >>> n_params(134_515_008), n_params(8_030_000_000)
        ('134.5 M', '8.03 B')
    """
    if value >= 10**9:
        return f"{value / 10**9:.2f} B"
    return f"{value / 10**6:.1f} M" if value >= 10**6 else f"{value:,}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A count and what is counted.

    Example:
        >>> counted(1, "row"), counted(2_000, "row"), counted(2, "patch", "patches")
        ('1 row', '2,000 rows', '2 patches')
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def unbroken(text: str) -> str:
    """A text in which no percent sign is on another line than its number.

    Example:
        >>> unbroken("2 % of 3 rows") == "2\u00a0% of 3 rows"
        True
    """
    return text.replace(" %", "\u00a0%")
