"""The header of a safetensors file: bytes to `TensorInfo`, and back. Pure; every rule of the format is checked.

A file is eight bytes (the header's length N, little-endian), N bytes of JSON, then the tensors' bytes without a
hole. Nothing in a header is trusted: a `TensorInfo` that exists lies wholly inside its file.

Source: the format section of the safetensors README (https://github.com/huggingface/safetensors#format).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from portllm.errors import HeaderError
from portllm.files.content import mistaken
from portllm.files.json_text import parse_json
from portllm.files.source import Source
from portllm.tensors.info import DTYPE_BITS, TensorInfo, n_bytes_of

MAX_HEADER_BYTES = 32_000_000
"""A quarter of a million tensors in one file, several times what any model has. The safetensors library allows three
times as much; one byte of a hostile header takes up to 26 bytes of memory to be understood, and so less than 1 GB is.
"""

MAX_DIMENSIONS = 64
"""More axes than any framework can hold."""

MAX_NAME_LENGTH = 1024
"""Characters of a tensor's name; ten times what any model has, and few enough to be compared with patterns."""

METADATA_KEY = "__metadata__"

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""What moves a terminal's cursor, begins a line, or turns the direction of writing."""


@dataclass(frozen=True, slots=True)
class Header:
    """A whole header: the tensors by name, and the file's string metadata."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def parse_header_length(prefix: bytes, *, file: Source, file_bytes: int) -> int:
    """The length of the JSON part, from the first eight bytes of a file.

    Raises:
        HeaderError: The file is shorter than it says, is something else, or the length is over `MAX_HEADER_BYTES`.
    """
    if len(prefix) < 8:
        raise HeaderError(f"'{file}': has {file_bytes} bytes; a safetensors file has at least 8. Download it again.")
    length = int.from_bytes(prefix[:8], "little")
    if 8 + length > min(file_bytes, 8 + MAX_HEADER_BYTES) and (problem := mistaken(prefix)) is not None:
        raise HeaderError(f"'{file}': {problem}")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            f"'{file}': its header claims {length} bytes, the limit is {MAX_HEADER_BYTES}. This is not a "
            "safetensors file, or it is corrupt."
        )
    if 8 + length > file_bytes:
        raise HeaderError(
            f"'{file}': its header claims {length} bytes, but the file has {file_bytes}. The file is truncated: "
            "download it again."
        )
    return length


def parse_header(text: bytes, *, file: Source, file_bytes: int) -> Header:
    """The tensors that the JSON part of a header describes.

    Args:
        text: The JSON part alone.
        file: Named in messages and in each `TensorInfo`.
        file_bytes: Size of the whole file, which the tensors must fill exactly.

    Raises:
        HeaderError: A rule of the format is broken; the message names the file, the tensor and the rule.

    Example:
        >>> from pathlib import Path
        >>> from portllm.files.source import LocalFile
        >>> text = b'{"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}'
        >>> parse_header(text, file=LocalFile(Path("m.safetensors")), file_bytes=8 + len(text) + 24).tensors["w"].shape
        (2, 3)
    """
    if not text.startswith(b"{"):
        raise _broken(file, "the header does not start with '{'.")
    try:
        entries = parse_json(text)
    except ValueError as error:
        raise _broken(file, f"the header is not valid JSON ({error}).") from error
    assert isinstance(entries, dict)  # it begins with a brace

    data_start = 8 + len(text)
    metadata = entries.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(file, f"'{METADATA_KEY}' must map strings to strings.")
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        problem = name_problem(name) or _entry_problem(entry)
        if problem:
            raise _broken(file, f"tensor {name[:MAX_NAME_LENGTH]!r}: {problem}")
        start, stop = entry["data_offsets"]
        tensors[name] = TensorInfo(
            name, entry["dtype"], tuple(entry["shape"]), file, data_start + start, data_start + stop
        )

    position = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != position:
            kind = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
            raise _broken(
                file, f"tensor '{info.name}': starts at byte {info.start} and {kind}, which ends at {position}."
            )
        position = info.stop
    if position != file_bytes:
        raise _broken(file, f"the tensors end at byte {position}, but the file has {file_bytes}.")
    return Header(tensors, metadata)


def render_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file: the length and the JSON part for tensors laid end to end in the given order.

    The JSON part is padded with spaces so that the first tensor is aligned to eight bytes.

    Example:
        >>> from pathlib import Path
        >>> from portllm.files.source import LocalFile
        >>> header = render_header([("w", "F32", (2, 3))], {})
        >>> parsed = parse_header(header[8:], file=LocalFile(Path("m")), file_bytes=len(header) + 24)
        >>> parsed.tensors["w"].start == len(header)
        True
    """
    entries: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        size = n_bytes_of(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _broken(file: Source, problem: str) -> HeaderError:
    return HeaderError(
        f"'{file}': {problem} The file is corrupt or malicious; download it again from a source you trust."
    )


def name_problem(name: str) -> str | None:
    """What is wrong with a tensor's name, or None: it goes into messages, and could write over a terminal."""
    if len(name) > MAX_NAME_LENGTH:
        return f"its name has {len(name)} characters, the limit is {MAX_NAME_LENGTH}."
    return "its name contains a control character." if _CONTROL.search(name) else None


def _entry_problem(entry: object) -> str | None:
    """What is wrong with one tensor's entry, or None."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "must have exactly 'dtype', 'shape' and 'data_offsets'."
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"has the unknown dtype {dtype!r}."
    if not isinstance(shape, list) or not all(_is_size(axis) for axis in shape) or len(shape) > MAX_DIMENSIONS:
        return f"has the shape {str(shape)[:80]}, which is not a list of sizes."
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        return f"has the offsets {str(offsets)[:80]}, which are not two positions."
    n_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if n_bits % 8:
        return f"has {n_bits} bits, which is not a whole number of bytes."
    if offsets[1] - offsets[0] != n_bits // 8:
        return f"holds {offsets[1] - offsets[0]} bytes; its shape and dtype need {n_bits // 8}."
    return None


def _is_size(value: object) -> bool:
    # bool is an int in Python, and JSON's `true` must not pass for 1; sizes are 64-bit in the format.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64
