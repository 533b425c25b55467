"""Regular expressions that come with a file, matched against names of modules without ever taking long. Pure.

Python's engine tries one way to match after another: `(a+)+$` against thirty letters takes hours. An expression is
therefore given to it only where the ways are few. Any other is run in all its states at once (Thompson), which takes
time proportional to name and expression; the answer is the same, since only the yes or no of a match is asked for.

Source: Ken Thompson, Regular expression search algorithm, CACM 11(6), 1968, https://doi.org/10.1145/363347.363387.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

# How Python itself reads an expression. `re` has no other door to it.
from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
from typing import Any

NAME_LENGTH = 64
"""Letters of a name for which ways are counted."""

FEW_WAYS = 1 << 14
BEARABLE_WAYS = 10**10
"""A bound on the ways of an expression that a program like PEFT may be given, which has Python's engine alone.

The widest that training programs write (four gaps and three lists of alternatives) has a tenth of it.
"""

MOST_WAYS = 1 << 64
MAX_STATES = 10_000
MAX_LENGTH = 100_000


@dataclass(frozen=True, slots=True)
class _Letter:
    """Takes one character; what a character may be is left to Python's engine."""

    one: "re.Pattern[str]"


@dataclass(frozen=True, slots=True)
class _Fork:
    """Goes on at each of these states."""

    states: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Goes on where the place is right: a beginning, an end, a boundary of a word."""

    here: "re.Pattern[str]"


@dataclass(frozen=True, slots=True)
class _Look:
    """Goes on where another program matches, or does not, from here on or up to here."""

    program: "tuple[_State, ...]"
    wanted: bool
    behind: int | None


_Parsed = Any
"""Parts of an expression as Python reads it: each a kind, and what it holds."""

_State = _Letter | _Fork | _Place | _Look


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A regular expression.

    Attributes:
        ways: A bound on the ways in which Python's engine could try to match a name of `NAME_LENGTH` letters.
        expression: For Python's engine.
        program: The states, where `ways` are many; the one behind the last is the end.
    """

    ways: int
    expression: "re.Pattern[str]"
    program: tuple[_State, ...] | None

    def begins(self, name: str) -> bool:
        """Whether the expression matches the beginning of a name, as `re.match` does."""
        if self.program is None:
            return self.expression.match(name) is not None
        return _reaches(self.program, name, 0, None)

    def is_all_of(self, name: str) -> bool:
        """Whether the expression matches the whole of a name, as `re.fullmatch` does.

        Example:
            >>> compile_pattern("(a+)+").is_all_of("a" * 40), compile_pattern("(a+)+").is_all_of("a" * 40 + "b")
            (True, False)
        """
        if self.program is None:
            return self.expression.fullmatch(name) is not None
        return _reaches(self.program, name, 0, len(name))


@lru_cache(maxsize=1 << 14)
def compile_pattern(text: str) -> NamePattern:
    """Read an expression.

    Raises:
        ValueError: It is none, or too long, or could take long and cannot be run otherwise (a group that is referred
            to, an atomic group, a look inside a look).
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"has {len(text)} characters, more than {MAX_LENGTH}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a later version of Python may read otherwise
            parsed = _parser.parse(text)
            expression = re.compile(text)
        ways = _ways(parsed)
        program = None if ways <= FEW_WAYS else tuple(_written([], parsed, parsed.state.flags, looks=0))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError("is not a valid regular expression") from error
    return NamePattern(ways, expression, program)


def _ways(items: _Parsed) -> int:
    product = 1
    for kind, content in items:
        match str(kind):
            case "BRANCH":
                product *= sum(map(_ways, content[1]))
            case "SUBPATTERN" | "ASSERT" | "ASSERT_NOT":
                product *= _ways(content[-1])
            case "ATOMIC_GROUP":
                product *= _ways(content)
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                least, most = min(content[0], NAME_LENGTH), min(content[1], NAME_LENGTH)
                product *= (most - least + 1) * min(MOST_WAYS, _ways(content[2])) ** most
            case "GROUPREF_EXISTS":
                product *= sum(_ways(choice) for choice in content[1:] if choice is not None)
        product = min(product, MOST_WAYS)
    return product


def _written(states: list[_State], items: _Parsed, flags: int, *, looks: int) -> list[_State]:
    """Append the states of these parts of an expression, one after the other."""
    for kind, content in items:
        _check_room(states)
        match str(kind):
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                states.append(_Letter(_alone((kind, content), flags)))
            case "AT":
                states.append(_Place(_alone((kind, content), flags)))
            case "SUBPATTERN":
                _, added, removed, body = content
                _written(states, body, (flags | added) & ~removed, looks=looks)
            case "BRANCH":
                _write_branches(states, content[1], flags, looks=looks)
            case "MAX_REPEAT" | "MIN_REPEAT":
                _write_repeat(states, content[0], content[1], content[2], flags, looks=looks)
            case "ASSERT" | "ASSERT_NOT" if not looks:
                direction, body = content
                program = tuple(_written([], body, flags, looks=1))
                behind = None if direction > 0 else body.getwidth()[0]
                states.append(_Look(program, wanted=str(kind) == "ASSERT", behind=behind))
            case _:
                raise ValueError(
                    "could take long to match; write it without what is inside a look, atomic or referred to"
                )
    return states


def _write_branches(states: list[_State], branches: Sequence[_Parsed], flags: int, *, looks: int) -> None:
    fork = len(states)
    states.append(_Fork(()))
    starts, ends = [], []
    for branch in branches:
        starts.append(len(states))
        _written(states, branch, flags, looks=looks)
        ends.append(len(states))
        states.append(_Fork(()))
    states[fork] = _Fork(tuple(starts))
    for end in ends:
        states[end] = _Fork((len(states),))


def _write_repeat(states: list[_State], least: int, most: int, body: _Parsed, flags: int, *, looks: int) -> None:
    for _ in range(least):
        before = len(states)
        _written(states, body, flags, looks=looks)
        if len(states) == before:  # nothing, however often
            return
    if most == _constants.MAXREPEAT:
        start = len(states)
        states.append(_Fork(()))
        _written(states, body, flags, looks=looks)
        states.append(_Fork((start,)))
        states[start] = _Fork((start + 1, len(states)))
        return
    forks = []
    for _ in range(most - least):
        _check_room(states)
        forks.append(len(states))
        states.append(_Fork(()))
        _written(states, body, flags, looks=looks)
    for fork in forks:
        states[fork] = _Fork((fork + 1, len(states)))


def _check_room(states: Sequence[_State]) -> None:
    if len(states) > MAX_STATES:
        raise ValueError(f"could take long to match, and has more than {MAX_STATES} states")


def _alone(item: tuple[Any, Any], flags: int) -> "re.Pattern[str]":
    state = _parser.State()
    state.flags = flags
    alone: re.Pattern[str] = _compiler.compile(_parser.SubPattern(state, [item]))
    return alone


def _reaches(program: Sequence[_State], name: str, start: int, stop: int | None) -> bool:
    """Whether the program ends, at `stop` or anywhere, when it begins at `start`."""
    states = _all_of(program, [0], name, start)
    for position in range(start, len(name) + 1):
        if len(program) in states and stop in (None, position):
            return True
        if not states or position in (stop, len(name)):
            return False
        letters = [(state, program[state]) for state in states if state < len(program)]
        taken = [state + 1 for state, item in letters if isinstance(item, _Letter) and item.one.match(name[position])]
        states = _all_of(program, taken, name, position + 1)
    return False


def _all_of(program: Sequence[_State], states: list[int], name: str, position: int) -> set[int]:
    """These states and all that they lead to before another character is taken."""
    found: set[int] = set()
    while states:
        state = states.pop()
        if state in found:
            continue
        found.add(state)
        item = program[state] if state < len(program) else None
        if isinstance(item, _Fork):
            states += item.states
        elif isinstance(item, _Place):
            states += [state + 1] if item.here.match(name, position) else []
        elif isinstance(item, _Look):
            states += [state + 1] if _sees(item, name, position) == item.wanted else []
    return found


def _sees(look: _Look, name: str, position: int) -> bool:
    if look.behind is None:
        return _reaches(look.program, name, position, None)
    return position >= look.behind and _reaches(look.program, name, position - look.behind, position)
