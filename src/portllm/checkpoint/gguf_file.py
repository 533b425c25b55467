"""A GGUF file, opened: its tensors, and its metadata by key and type.

What lives here knows the container, not the models in it: a key that is missing or of another type is refused with
its name, and what the `gguf` package raises on a damaged file becomes a `CheckpointError`.

Source: the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFReader, ReaderTensor

from portllm.errors import CheckpointError

_DAMAGE = (ValueError, KeyError, IndexError, OverflowError, TypeError, MemoryError, struct.error)
"""What the `gguf` package raises on bytes that are not a GGUF file; none of it is a bug of ours."""


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open GGUF file; its tensors are mapped into memory, not read.

    Attributes:
        path: The file, for messages.
        reader: The `gguf` package's view of it.
    """

    path: Path
    reader: GGUFReader

    @property
    def tensors(self) -> tuple[ReaderTensor, ...]:
        """Every tensor, in the order of the file."""
        return tuple(self.reader.tensors)

    def keys(self, prefix: str) -> tuple[str, ...]:
        """The metadata keys that begin with `prefix`, in the order of the file."""
        return tuple(key for key in self.reader.fields if key.startswith(prefix))

    def has(self, key: str) -> bool:
        """Whether the metadata has this key."""
        return key in self.reader.fields

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
            raise self._wrong_type(key, f"a whole number of at least {least}", value)
        return value

    def positive(self, key: str) -> float:
        """A finite number above zero."""
        value = self._value(key)
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            raise self._wrong_type(key, "a number above zero", value)
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        value = self._value(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong_type(key, "a list of strings", value)
        return value

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers."""
        value = self._value(key)
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self._wrong_type(key, "a list of whole numbers", value)
        return value

    def refuse(self, found: str) -> CheckpointError:
        """The error that names this file; `found` says what is wrong and what to do."""
        return CheckpointError(f"'{self.path}': {found}")

    def _value(self, key: str) -> object:
        field = self.reader.fields.get(key)
        if field is None:
            raise self.refuse(f"its metadata has no '{key}', which this conversion needs. Convert the model again.")
        try:
            value: object = field.contents()
        except _DAMAGE as error:
            raise self.refuse(f"its metadata '{key}' cannot be read ({error}). The file is damaged.") from error
        return value

    def _wrong_type(self, key: str, expected: str, found: object) -> CheckpointError:
        return self.refuse(f"its metadata '{key}' is {str(found)[:80]!r}; expected {expected}.")


def open_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file and parse its metadata; no tensor is read.

    Raises:
        CheckpointError: The file cannot be read, is not GGUF, is damaged, or has the other byte order.
    """
    try:
        reader = GGUFReader(path)
    except OSError as error:
        raise CheckpointError(f"'{path}': cannot be read: {error.strerror}.") from error
    except _DAMAGE as error:
        raise CheckpointError(
            f"'{path}': is not a whole GGUF file of a version that is understood ({error}). Fetch the file again."
        ) from error
    if reader.byte_order != "I":
        raise CheckpointError(f"'{path}': is of the other byte order; only files of this machine's order are read.")
    return GGUFFile(path, reader)


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
