"""Tables of a TOML file as values of our classes: a class's fields are the keys, their types what may stand there."""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from portllm.errors import PortLLMError
from portllm.files.toml_text import meant

T = TypeVar("T")

Tell = Callable[[tuple[str, ...], str], None]
"""Takes the path to a key, and what is wrong with it."""


def read_table(cls: type[T], table: object, path: tuple[str, ...], tell: Tell, **known: object) -> T | None:
    """A table as a value of a dataclass, or None where it is wrong; every problem is told.

    Args:
        cls: A dataclass; a field without default is a key that must be given.
        table: What stands in the file.
        path: Where.
        tell: Takes the problems.
        **known: Fields that are given here and are no keys.
    """
    if not isinstance(table, Mapping):
        tell(path, f"is {kind_of(table)}; expected a table")
        return None
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in known}  # type: ignore[arg-type]
    right = True
    for key in table:
        if key not in fields:
            tell((*path, key), f"unknown key. {meant(key, fields)}")
            right = False
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in table:
            expected = hints[name]
            values[name] = tuple(table[name]) if isinstance(table[name], list) else table[name]
            if not fits(values[name], expected):
                tell((*path, name), f"is {kind_of(table[name])}; expected {describe(expected)}")
                right = False
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            tell((*path, name), "is required")
            right = False
    if not right:
        return None
    try:
        return cls(**values, **known)
    except PortLLMError as error:
        tell(path, str(error).rstrip("."))
        return None


def fits(value: object, expected: Any) -> bool:  # noqa: ANN401 (a type, of any form)
    """Whether a value of TOML is one of a type; a whole number is a number, a boolean is neither.

    Example:
        >>> fits(3, float), fits(True, int), fits(("a",), str | tuple[str, ...]), fits("x", typing.Literal["x", "y"])
        (True, False, True, True)
    """
    match typing.get_origin(expected):
        case types.UnionType | typing.Union:
            return any(fits(value, part) for part in typing.get_args(expected))
        case typing.Literal:
            return value in typing.get_args(expected)
        case _tuple if _tuple is tuple:
            inner = typing.get_args(expected)[0]
            return isinstance(value, tuple) and all(fits(part, inner) for part in value)
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, (int, float) if expected is float else expected)


def describe(expected: Any) -> str:  # noqa: ANN401 (a type, of any form)
    """A type in words.

    Example:
        >>> describe(int | None), describe(tuple[str, ...]), describe(typing.Literal["lora", "full"])
        ('an integer', 'a list, each a text', "'lora' or 'full'")
    """
    match typing.get_origin(expected):
        case types.UnionType | typing.Union:
            return " or ".join(describe(part) for part in typing.get_args(expected) if part is not type(None))
        case typing.Literal:
            return " or ".join(map(repr, typing.get_args(expected)))
        case _tuple if _tuple is tuple:
            return f"a list, each {describe(typing.get_args(expected)[0])}"
    names = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}
    return names[expected]


def kind_of(value: object) -> str:
    """A value of TOML as a message shows it."""
    match value:
        case Mapping():
            return "a table"
        case bool():
            return "true" if value else "false"
        case list() | tuple():
            return f"the list {list(value)}"
        case _:
            return repr(value)
