"""JSON from a file that nobody vouches for: read strictly, so that no two readers understand it differently. Pure.

Python's reader lets pass what others refuse or read otherwise: a key that stands twice, half of a surrogate pair, NaN,
numbers that no float holds. All of these are refused here.

Source: RFC 8259, sections 4, 6 and 8 (https://www.rfc-editor.org/rfc/rfc8259), and RFC 7493.
"""

import json
import math
import re
from itertools import chain

MAX_DEPTH = 64
"""Objects and lists inside each other; what is deeper can be read, and not written again."""

MAX_DIGITS = 300
"""Of a whole number: what a float can hold, and far more than any size or identity has."""

MAX_VALUES = 6_000_000
"""In one text, counted by commas and opening brackets; the largest tokenizers have two million. Without a bound 60 MB
of lists inside lists would take 3 GB of memory, a hundred bytes for each three.
"""

_HALF_OF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(text: bytes, *, infinities: bool = False, numbers_as_text: bool = False) -> object:
    """The value that a JSON text stands for.

    Args:
        text: In UTF-8, without a byte order mark.
        infinities: Let Python's `Infinity` and `NaN` pass, which transformers writes into `config.json`.
        numbers_as_text: Leave numbers as they are written: no digit is lost, and 1e5 is not turned into 100000.0.

    Raises:
        ValueError: It is no JSON, or not such as every reader reads alike; the message says what is wrong.

    Example:
        >>> parse_json(b'{"r": 4}')
        {'r': 4}
        >>> parse_json(b'{"r": 4, "r": 8}')
        Traceback (most recent call last):
        ValueError: duplicate key 'r'
    """
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES} values")
    try:
        value: object = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=float if infinities else _no_constant,
            parse_float=str if numbers_as_text else _number,
            parse_int=str if numbers_as_text else _whole_number,
        )
        require_shallow(value)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    check_pairs(text, value)
    return value


def check_pairs(text: bytes, value: object) -> None:
    """See to it that no text in a value is half of a surrogate pair, which stands for no character.

    Args:
        text: The JSON of the value.
        value: What was made of it.

    Raises:
        ValueError: One is.
    """
    if _HALF_OF_A_PAIR.search(text):
        _require_whole_pairs(value)


def _require_whole_pairs(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("it contains an unpaired surrogate") from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"duplicate key {name!r}")
            seen.add(name)
    return found


def _no_constant(token: str) -> float:
    raise ValueError(f"{token} is not valid JSON")


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} exceeds the supported range")
    return value


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits exceeds the supported range")
    return int(text)


def require_shallow(value: object) -> None:
    """Raise ValueError if a value of objects and lists is nested more deeply than `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inside = chain.from_iterable(
            item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)
        )
        level = [item for item in inside if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def is_utf8(text: str) -> bool:
    r"""Whether a text can be written to a file: the name of one may hold bytes that stand for no character.

    Example:
        >>> is_utf8("modèle"), is_utf8("mod\udce8le")
        (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
