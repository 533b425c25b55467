"""Values of JSON and TOML as values of our types; msgspec decides, and what does not fit is told in its place.

Tables become dataclasses or msgspec's structs: the fields are the keys, their types what may stand there.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec

from portllm.errors import PortLLMError
from portllm.files.toml_text import meant

T = TypeVar("T")

Path: TypeAlias = tuple[str, ...]
Tell: TypeAlias = Callable[[Path, str], None]
"""Takes the path to a key, and what is wrong with it."""

EACH_ONCE = msgspec.Meta(min_length=1, extra_json_schema={"uniqueItems": True})
"""Of a list: one or more, each once."""

MOST_SHOWN = 80
"""Characters of a value in a message."""


def decode(cls: type[T], values: object) -> T:
    """Values of JSON as one of a type.

    Raises:
        ValueError: They do not fit; the message says where, what is there, and what was expected.

    Example:
        >>> class Point(msgspec.Struct):
        ...     at: tuple[float, ...]
        >>> decode(Point, {"at": [1, 2]})
        Point(at=(1.0, 2.0))
        >>> decode(Point, {"at": "x"})
        Traceback (most recent call last):
        ValueError: at: is 'x'; expected a list, each a number
    """
    try:
        found = msgspec.convert(values, cls)
        wrong = None
    except ValueError as error:
        found, wrong = None, error
    if found is None or _without_tag(cls, values):
        path, problem = next(problems(values, cls), ((), str(wrong)))
        raise ValueError(f"{'.'.join(path)}: {problem}" if path else problem) from wrong
    return found


def read_table(cls: type[T], table: object, path: Path, tell: Tell, **known: object) -> T | None:
    """A table of TOML as a value of a dataclass, or None where it is wrong; every problem is told.

    Args:
        cls: A dataclass; a field without default is a key that must be given.
        table: What stands in the file.
        path: Where.
        tell: Takes the problems.
        **known: Fields that are given here and are no keys.
    """
    wrong = list(problems(table, cls, path, known))
    if not wrong and isinstance(table, Mapping):
        try:
            expected = {key: of for key, (of, _) in _keys(cls).items()}
            return cls(**{key: msgspec.convert(value, expected[key]) for key, value in table.items()}, **known)
        except PortLLMError as error:
            wrong.append((path, str(error).rstrip(".")))
    for place, problem in wrong:
        tell(place, problem)
    return None


def problems(value: object, expected: Any, path: Path = (), known: Collection[str] = ()) -> Iterator[tuple[Path, str]]:  # noqa: ANN401 (a type, of any form)
    """Everything that keeps a value from being one of a type: the path to it, and what it is.

    Args:
        value: Of JSON or TOML.
        expected: The type.
        path: Where the value stands.
        known: Fields of the table that are no keys of it.

    Example:
        >>> list(problems({"a": 1, "b": "x"}, dict[str, int], ("seeds",)))
        [(('seeds', 'b'), "is 'x'; expected an integer")]
    """
    inside = list(_inside(value, expected, path, known))
    yield from inside
    if inside or known:
        return
    try:
        msgspec.convert(value, expected)
    except PortLLMError as error:
        yield path, str(error).rstrip(".")
    except ValueError:
        yield path, f"is {shown(value)}; expected {describe(expected)}"
    else:
        if isinstance(value, list) and _is_once(expected) and len(set(map(repr, value))) < len(value):
            yield path, f"is {shown(value)}; expected {describe(expected)}"


def _inside(value: object, expected: Any, path: Path, known: Collection[str]) -> Iterator[tuple[Path, str]]:  # noqa: ANN401
    """The problems of the values in a table, a mapping, or a list of tables."""
    for part in _alternatives(expected):
        if isinstance(value, Mapping) and _is_table(part):
            yield from _in_table(value, part, path, known)
        elif isinstance(value, Mapping) and typing.get_origin(part) in (Mapping, dict):
            of_key, of_value = typing.get_args(part)
            for key, item in value.items():
                yield from problems(key, of_key, (*path, key))
                yield from problems(item, of_value, (*path, key))
        elif isinstance(value, list) and typing.get_origin(part) is tuple and _is_table(typing.get_args(part)[0]):
            for number, item in enumerate(value):
                yield from problems(item, typing.get_args(part)[0], (*path, str(number)))


def _in_table(table: Mapping[str, object], cls: type, path: Path, known: Collection[str]) -> Iterator[tuple[Path, str]]:
    keys = {key: how for key, how in _keys(cls).items() if key not in known}
    for key, value in table.items():
        if key in keys:
            yield from problems(value, keys[key][0], (*path, key))
        elif not issubclass(cls, msgspec.Struct) or cls.__struct_config__.forbid_unknown_fields:
            yield (*path, key), f"unknown key. {meant(key, keys)}"
    for key, (_, is_required) in keys.items():
        if is_required and key not in table:
            yield (*path, key), "is required"


def _keys(cls: type) -> dict[str, tuple[Any, bool]]:
    """The keys of a table: what may stand there, and whether something must."""
    if issubclass(cls, msgspec.Struct):
        config = cls.__struct_config__
        tag = {config.tag_field: (Literal[config.tag], True)} if config.tag_field else {}
        return tag | {field.encode_name: (field.type, field.required) for field in msgspec.structs.fields(cls)}
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        field.name: (hints[field.name], field.default is field.default_factory is dataclasses.MISSING)
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
    }


def _without_tag(cls: type, values: object) -> bool:
    """Whether a table does not say which version it is of, which msgspec lets pass."""
    field = cls.__struct_config__.tag_field if issubclass(cls, msgspec.Struct) else None
    return field is not None and isinstance(values, Mapping) and field not in values


def _alternatives(expected: Any) -> list[Any]:  # noqa: ANN401
    match typing.get_origin(expected):
        case types.UnionType | typing.Union:
            return [one for part in typing.get_args(expected) for one in _alternatives(part)]
        case _annotated if _annotated is Annotated:
            return _alternatives(expected.__origin__)
    return [expected]


def _is_table(expected: object) -> bool:
    return isinstance(expected, type) and (dataclasses.is_dataclass(expected) or issubclass(expected, msgspec.Struct))


def _is_once(expected: object) -> bool:
    return EACH_ONCE in getattr(expected, "__metadata__", ())


def describe(expected: Any) -> str:  # noqa: ANN401
    """A type in words.

    Example:
        >>> describe(int | None), describe(tuple[str, ...]), describe(Literal["lora", "full"])
        ('an integer', 'a list, each a text', "'lora' or 'full'")
        >>> describe(Annotated[tuple[int, ...], EACH_ONCE])
        'a list, each an integer; one or more, each once'
    """
    arguments = typing.get_args(expected)
    match typing.get_origin(expected):
        case types.UnionType | typing.Union:
            return " or ".join(describe(part) for part in arguments if part not in (types.NoneType, msgspec.UnsetType))
        case _literal if _literal is Literal:
            return " or ".join(map(repr, arguments))
        case _tuple if _tuple is tuple:
            return f"a list, each {describe(arguments[0])}"
        case _annotated if _annotated is Annotated:
            if _is_once(expected):
                return f"{describe(expected.__origin__)}; one or more, each once"
            return expected.__metadata__[0].description or describe(expected.__origin__)
    return {str: "a text", int: "an integer", float: "a number", bool: "true or false"}.get(expected, "a table")


def shown(value: object) -> str:
    """A value as a message shows it."""
    match value:
        case Mapping():
            return "a table"
        case bool():
            return "true" if value else "false"
        case None:
            return "null"
        case list() | tuple():
            text = f"the list {list(value)}"
        case _:
            text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
