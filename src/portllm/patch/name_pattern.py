"""Regular expressions that come with a file, matched against names of modules within a bounded time.

Python's engine tries one way to match after another, and nothing stops it: `(a|aa)+$` against sixty letters takes
hours. It is given plain names alone. The rest goes to the `regex` library, which reads the same language and gives up
when a time is over. Whether PEFT, which has Python's engine only, would come to an end is tried in a process that can
be ended.
"""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from portllm.errors import AdapterFormatError

if TYPE_CHECKING:
    from regex import Match

MATCH_SECONDS = 1.0
"""Of one name; the patterns of training programs take microseconds."""

TRIAL_SECONDS = 10.0
"""Of Python's engine with all names of a model, the start of a process included."""

MAX_LENGTH = 100_000
MAX_WRITTEN_OUT = 20_000
"""Of an expression with each group written out as often as it is counted, as `regex` does with some."""

_PLAIN = re.compile(r"[A-Za-z0-9_.-]*")
_COUNT = re.compile(r"(\)?)\{(\d*)(?:,(\d*))?\}")
_READ_OTHERWISE = re.compile(r"\{[^}]*[a-z]|\[:|\(DEFINE\)")
"""What `regex` has beyond `re`, which takes it otherwise: fuzzy matches, classes of POSIX, definitions."""

_TRIAL = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
patterns, names = json.load(sys.stdin)
for expression, whole in patterns:
    for name in names:
        (re.fullmatch if whole else re.match)(expression, name)
"""


@dataclass(frozen=True)
class NamePattern:
    """A regular expression of a configuration, as PEFT uses it.

    Attributes:
        written: As it stands in the file.
        before: What PEFT puts before it.
        after: What PEFT puts behind it.
        whole: Whether it has to match the whole of a name, and not the beginning alone.
    """

    written: str
    before: str = ""
    after: str = ""
    whole: bool = False

    @property
    def expression(self) -> str:
        """All of it."""
        return f"{self.before}{self.written}{self.after}"

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is a name, so that no engine can take long."""
        return _PLAIN.fullmatch(self.written) is not None

    def problem(self) -> str | None:
        """Why it cannot be used, to follow `which`; None where it can."""
        if len(self.expression) > MAX_LENGTH:
            return f"has {len(self.expression)} characters, more than {MAX_LENGTH}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a later version of Python may read otherwise
                re.compile(self.expression)
                if self.is_plain:
                    return None
                if _READ_OTHERWISE.search(self.written):
                    return "not all engines read alike; write it without braces around words and without '[:'"
                if _written_out(self.written) > MAX_WRITTEN_OUT:
                    return "could take long to match; repeat groups less often"
                self._find("")
        except TimeoutError:
            return "takes long to match"
        except (re.error, RecursionError, OverflowError, ValueError):
            return "is not a valid regular expression"
        return None

    def match(self, name: str) -> "re.Match[str] | Match[str] | None":
        r"""The match of a name, as PEFT would find it.

        Raises:
            AdapterFormatError: It takes more than `MATCH_SECONDS`.

        Example:
            >>> NamePattern(r"(?:\w+\.)*q", whole=True).match("h.0.q")[0]
            'h.0.q'
        """
        try:
            return self._find(name)
        except TimeoutError:
            raise AdapterFormatError(
                f"adapter_config.json: {self.written[:60]!r} takes more than {MATCH_SECONDS:g} s to match the name "
                f"{name[:60]!r}. Name the modules in a list, or write a simpler expression."
            ) from None

    @cached_property
    def _find(self) -> "Callable[[str], re.Match[str] | Match[str] | None]":
        if self.is_plain:
            plain = re.compile(self.expression)
            return plain.fullmatch if self.whole else plain.match
        # Where all patterns are names, as nearly always, the library is not needed.
        import regex

        try:
            compiled = regex.compile(self.expression, regex.VERSION0)
        except regex.error as error:
            raise ValueError(str(error)) from error
        found = compiled.fullmatch if self.whole else compiled.match
        return lambda name: found(name, timeout=MATCH_SECONDS)


def takes_python_long(patterns: Iterable[NamePattern], names: Iterable[str]) -> bool:
    """Whether Python's own engine needs more than `TRIAL_SECONDS` to match all of these names."""
    tried = [(pattern.expression, pattern.whole) for pattern in patterns if not pattern.is_plain]
    if not tried:
        return False
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRIAL],
            input=json.dumps([tried, sorted(set(names))]).encode(),
            stderr=subprocess.DEVNULL,
            timeout=TRIAL_SECONDS,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return True
    return False


def _written_out(text: str) -> int:
    """A bound on an expression's length when what is counted is written out: only groups can hold other counts."""
    groups, letters = 1, 0
    for group, least, most in _COUNT.findall(text):
        count = max(int(least or 1), int(most or 1), 1)
        if group:
            groups *= count
        else:
            letters += count
    return groups * (len(text) + letters) if groups > 1 else letters
