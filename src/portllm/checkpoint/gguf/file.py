"""A GGUF file, opened: its tensors, and its metadata by key and type.

What lives here knows the container, not the models in it: a key that is missing or of another type is refused with
its name.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from portllm.checkpoint.gguf.header import GGUFHeader, ListPlace, Value, read_gguf_header, read_gguf_list
from portllm.errors import CheckpointError
from portllm.files.source import LocalFile


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open GGUF file; lists of its metadata and tensors are read when they are asked for.

    Attributes:
        header: What its header says.
    """

    header: GGUFHeader

    @property
    def source(self) -> LocalFile:
        """The file."""
        return self.header.file

    def keys(self, prefix: str) -> tuple[str, ...]:
        """The metadata keys that begin with `prefix`, in the order of the file."""
        return tuple(key for key in self.header.fields if key.startswith(prefix))

    def has(self, key: str) -> bool:
        """Whether the metadata has this key."""
        return key in self.header.fields

    def text(self, key: str) -> str:
        """A string.

        Raises:
            CheckpointError: The key is missing or holds something else; so for every method below.
        """
        value = self._value(key)
        if not isinstance(value, str):
            raise self._wrong_type(key, "a string", value)
        return value

    def flag(self, key: str) -> bool:
        """A boolean."""
        value = self._value(key)
        if not isinstance(value, bool):
            raise self._wrong_type(key, "a boolean", value)
        return value

    def integer(self, key: str, *, least: int = 0) -> int:
        """A whole number of at least `least`."""
        value = self._value(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self._wrong_type(key, f"an integer of at least {least}", value)
        return value

    def positive(self, key: str) -> float:
        """A finite number above zero."""
        value = self._value(key)
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            raise self._wrong_type(key, "a positive number", value)
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        value = self._value(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong_type(key, "a list of strings", value)
        return [str(item) for item in value]

    def length(self, key: str) -> int | None:
        """How many items a list has, without reading them; None where there is no such list."""
        value = self.header.fields.get(key)
        return value.count if isinstance(value, ListPlace) else None

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers."""
        value = self._value(key)
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self._wrong_type(key, "a list of integers", value)
        return [item for item in value if isinstance(item, int)]

    def refuse(self, found: str) -> CheckpointError:
        """The error that names this file; `found` says what is wrong and what to do."""
        return CheckpointError(f"'{self.source}': {found}")

    def _value(self, key: str) -> Value | list[Value]:
        value = self.header.fields.get(key)
        if value is None:
            raise self.refuse(f"its metadata has no '{key}', which is required. Convert the model again.")
        return read_gguf_list(self.source, value) if isinstance(value, ListPlace) else value

    def _wrong_type(self, key: str, expected: str, found: object) -> CheckpointError:
        return self.refuse(f"its metadata '{key}' is {str(found)[:80]!r}; expected {expected}.")


def open_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file; see `read_gguf_header`."""
    return GGUFFile(read_gguf_header(path))


def listed(names: Iterable[str]) -> str:
    """Up to ten names in quotes, and the count of the rest, for a message.

    Example:
        >>> listed(["b", "a"])
        "'a', 'b'"
    """
    ordered = sorted(names)
    rest = len(ordered) - 10
    shown = ", ".join(f"'{name}'" for name in ordered[:10])
    return f"{shown} and {rest} more" if rest > 0 else shown
