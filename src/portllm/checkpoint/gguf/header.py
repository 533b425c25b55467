"""The header of a GGUF file: bytes to metadata and tensors; every rule of the format that is relied on is checked.

A file is a magic word, a version, two counts, key-value pairs, descriptions of tensors, and the tensors' bytes at
aligned places. Nothing in it is trusted: no count or length makes this allocate more than the file has bytes for, and
a tensor that is returned lies wholly inside its file and overlaps no other. Lists are left where they are; `ListPlace`
says where that is.

Source: the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from portllm.checkpoint.safetensors.header import name_problem
from portllm.checkpoint.safetensors.header_file import size_of
from portllm.errors import CheckpointError
from portllm.files.content import FEWEST, mistaken
from portllm.files.input_file import open_input, open_unchanged, state_of
from portllm.files.source import LocalFile
from portllm.tensors.encoding import GGML_TYPES

MAX_FIELDS = 1 << 16
MAX_TENSORS = 1 << 18
"""Far more than any model has: some dozens, and some thousands."""

MAX_TEXT_BYTES = 1 << 24
MAX_TEXTS_BYTES = 1 << 27
"""Of all texts of a header or a list together; the tokens and merges of a large vocabulary have some ten million."""

MAX_NAME_BYTES = 1 << 16
MAX_LIST = 1 << 22
"""A large vocabulary has a quarter of a million tokens, and twice as many merges."""

MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

_SCALARS: Mapping[int, struct.Struct] = {
    number: struct.Struct("<" + letter)
    for number, letter in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}.items()
}
_BOOL, _TEXT, _LIST = 7, 8, 9


class DamagedGGUFError(Exception):
    """The bytes break a rule of the format; never leaves this package."""


@dataclass(frozen=True, slots=True)
class ListPlace:
    """A list in the metadata, not read yet.

    Attributes:
        kind: The number of its items' type.
        count: How many there are.
        position: Of the first one in the file.
    """

    kind: int
    count: int
    position: int


Value = bool | int | float | str | ListPlace


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as the header describes it.

    Attributes:
        name: Its name in the file.
        shape: Its axes, outermost first.
        type: Its storage type, such as `Q4_K`.
        elements: Elements of a block of that type.
        block_bytes: Bytes of such a block.
        start: First byte, counted from the start of the file.
        stop: One past its last byte.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    elements: int
    block_bytes: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """The metadata by key and the tensors by name, both in the order of the file, and the file as it was then."""

    file: LocalFile
    fields: Mapping[str, Value]
    tensors: Mapping[str, StoredTensor]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header of a file; no list and no tensor is read.

    Raises:
        CheckpointError: The file cannot be read, is not GGUF, is damaged, or has the other byte order.
    """
    try:
        with open_input(path) as stream:
            head = stream.read(FEWEST)
            if not head.startswith(b"GGUF") and (other := mistaken(head)) is not None:
                raise CheckpointError(f"'{path}': {other}")
            stream.seek(0)
            return _header(_Cursor(stream), LocalFile(path, state_of(stream.fileno())))
    except OSError as error:
        raise CheckpointError(f"'{path}': cannot be read: {error.strerror}.") from error
    except DamagedGGUFError as error:
        raise CheckpointError(
            f"'{path}': is not a complete GGUF file of a supported version ({error}). Download it again."
        ) from error


def read_gguf_list(file: LocalFile, place: ListPlace) -> list[Value]:
    """The items of a list in the metadata.

    Raises:
        CheckpointError: The file cannot be read or changed since its header was read.
    """
    try:
        with os.fdopen(open_unchanged(file), "rb") as stream:
            cursor = _Cursor(stream)
            cursor.skip(place.position)
            return [cursor.value(place.kind) for _ in range(place.count)]
    except (OSError, DamagedGGUFError) as error:
        raise CheckpointError(f"'{file}': cannot be read ({error}). Download it again.") from error


class _Cursor:
    """A place in a file; every step is checked against the bytes that are left before anything is allocated."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._left = os.fstat(stream.fileno()).st_size
        self._texts_left = MAX_TEXTS_BYTES
        self.position = 0

    def take(self, count: int) -> bytes:
        self._advance(count)
        data = self._stream.read(count)
        if len(data) != count:
            raise DamagedGGUFError("it was truncated while it was being read")
        return data

    def skip(self, count: int) -> None:
        self._advance(count)
        self._stream.seek(self.position)

    def number(self, kind: int) -> int:
        value = _SCALARS[kind].unpack(self.take(_SCALARS[kind].size))[0]
        return int(value)

    def text(self, limit: int) -> str:
        data = self.take(self._bounded(self.number(10), min(limit, self._texts_left), "a string of {} bytes"))
        self._texts_left -= len(data)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedGGUFError(f"a string before byte {self.position} is not UTF-8") from error

    def name(self) -> str:
        name = self.text(MAX_NAME_BYTES)
        if problem := name_problem(name):
            raise DamagedGGUFError(f"before byte {self.position}: {problem.removesuffix('.')}")
        return name

    def count(self, limit: int, what: str) -> int:
        return self._bounded(self.number(10), limit, what)

    def value(self, kind: int) -> Value:
        if kind in _SCALARS:
            value = _SCALARS[kind].unpack(self.take(_SCALARS[kind].size))[0]
            return float(value) if isinstance(value, float) else int(value)
        match kind:
            case 7:
                return self.take(1) != b"\0"
            case 8:
                return self.text(MAX_TEXT_BYTES)
            case 9:
                return self._list()
            case _:
                raise DamagedGGUFError(f"before byte {self.position} there is a value of type {kind}")

    def _list(self) -> ListPlace:
        kind = self.number(4)
        place = ListPlace(kind, self.count(MAX_LIST, "a list of {}"), self.position)
        if kind == _TEXT:
            for _ in range(place.count):
                self.skip(self._bounded(self.number(10), MAX_TEXT_BYTES, "a string of {} bytes"))
        elif kind in _SCALARS or kind == _BOOL:
            self.skip(place.count * (1 if kind == _BOOL else _SCALARS[kind].size))
        else:
            raise DamagedGGUFError(f"before byte {self.position} there is a list of type {kind}")
        return place

    def _bounded(self, found: int, limit: int, what: str) -> int:
        if found > min(limit, self._left):  # an item takes a byte at least
            raise DamagedGGUFError(f"before byte {self.position} it announces {what.format(found)}")
        return found

    def _advance(self, count: int) -> None:
        if count > self._left:
            raise DamagedGGUFError(f"it ends within something that takes {count} bytes at {self.position}")
        self._left -= count
        self.position += count


def _header(cursor: _Cursor, file: LocalFile) -> GGUFHeader:
    if cursor.take(4) != b"GGUF":
        raise DamagedGGUFError("it does not start with 'GGUF'")
    version = cursor.number(4)
    if version and not version & 0xFFFF:
        raise CheckpointError(f"'{file}': is big-endian; only little-endian files are supported.")
    if version not in (2, 3):
        raise DamagedGGUFError(f"its version is {version}; versions 2 and 3 are supported")
    n_tensors = cursor.count(MAX_TENSORS, "{} tensors")
    n_fields = cursor.count(MAX_FIELDS, "{} metadata entries")
    fields: dict[str, Value] = {}
    for _ in range(n_fields):
        key = cursor.name()
        if key in fields:
            raise DamagedGGUFError(f"its metadata has '{key}' twice")
        fields[key] = cursor.value(cursor.number(4))
    described = [_tensor(cursor) for _ in range(n_tensors)]
    alignment = fields.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment % 8:
        raise DamagedGGUFError(f"its alignment is {str(alignment)[:80]}")
    start = -(-cursor.position // alignment) * alignment
    return GGUFHeader(file, fields, _placed(described, start, alignment, size_of(file)))


def _tensor(cursor: _Cursor) -> StoredTensor:
    """One description, with its place counted from the first tensor."""
    name = cursor.name()
    n_axes = cursor.number(4)
    if not 1 <= n_axes <= MAX_DIMENSIONS:
        raise DamagedGGUFError(f"its tensor '{name}' has {n_axes} axes")
    shape = tuple(reversed([cursor.number(10) for _ in range(n_axes)]))  # GGUF lists the innermost axis first
    number, offset = cursor.number(4), cursor.number(10)
    if number not in GGML_TYPES:
        raise DamagedGGUFError(f"its tensor '{name}' has the unknown type {number}")
    kind, elements, block_bytes = GGML_TYPES[number]
    if not all(shape) or math.prod(shape) >= 2**62 or shape[-1] % elements:
        raise DamagedGGUFError(f"its tensor '{name}' is {shape} in {kind}, whose blocks are of {elements}")
    return StoredTensor(
        name, shape, kind, elements, block_bytes, offset, offset + math.prod(shape) // elements * block_bytes
    )


def _placed(tensors: list[StoredTensor], start: int, alignment: int, file_bytes: int) -> dict[str, StoredTensor]:
    """The tensors by name with their places in the file."""
    placed: dict[str, StoredTensor] = {}
    for tensor in tensors:
        first, last = start + tensor.start, start + tensor.stop
        if tensor.name in placed:
            raise DamagedGGUFError(f"it has two tensors named '{tensor.name}'")
        if tensor.start % alignment or last > file_bytes:
            raise DamagedGGUFError(f"its tensor '{tensor.name}' lies at {first} to {last} of {file_bytes} bytes")
        placed[tensor.name] = StoredTensor(
            tensor.name, tensor.shape, tensor.type, tensor.elements, tensor.block_bytes, first, last
        )
    end = 0
    for tensor in sorted(placed.values(), key=lambda tensor: tensor.start):
        if tensor.start < end:
            raise DamagedGGUFError(f"its tensor '{tensor.name}' overlaps the one before it")
        end = tensor.stop
    return placed
