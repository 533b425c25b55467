"""What a header says of a tensor: dtype, shape, and where its bytes are."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from portllm.errors import UnsupportedDtypeError
from portllm.files.source import Source
from portllm.tensors.encoding import Encoding

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip
"""Bits of one element, by the name that headers use."""

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""The dtypes that weights are computed in and stored as."""

_WORDS = {"half": "F16", "float": "F32", "double": "F64", "bf16": "BF16", "bfloat16": "BF16"}


def float_dtype(name: str) -> str:
    """Which of `FLOAT_DTYPES` a name means, in the spelling of headers, of torch, or of the command lines of others.

    Raises:
        UnsupportedDtypeError: None of them.

    Example:
        >>> [float_dtype(name) for name in ("BF16", "bfloat16", "torch.float16", "fp32", "double")]
        ['BF16', 'BF16', 'F16', 'F32', 'F64']
    """
    plain = name.lower().removeprefix("torch.")
    found = _WORDS.get(plain, f"F{plain.removeprefix('float').removeprefix('fp').removeprefix('f')}")
    if found not in FLOAT_DTYPES:
        raise UnsupportedDtypeError(
            f"unknown dtype {name!r}; expected one of {', '.join(FLOAT_DTYPES)}, or torch's name of one (bfloat16)."
        )
    return found


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it; no byte of it has been read.

    Attributes:
        name: Its name in the file; of a quantized weight, the name that its values have in any other file.
        dtype: A key of `DTYPE_BITS`; for an encoded tensor that of its values once they are decoded.
        shape: Its axes, outermost first; `()` for a scalar.
        file: The file that holds it.
        start: First byte, counted from the start of the file.
        stop: One past its last byte.
        encoding: How its bytes stand for its values; None where they are the values.
        parts: What else decoding needs, by what follows the tensor's name.
        listed: The tensor as the header lists it, where that has another name, dtype or shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Source
    start: int
    stop: int
    encoding: Encoding | None = None
    parts: tuple[tuple[str, "TensorInfo"], ...] = ()
    listed: "TensorInfo | None" = None

    @property
    def stored_name(self) -> str:
        """Its name in the file."""
        return self.name if self.listed is None else self.listed.name

    @property
    def n_bytes(self) -> int:
        """Bytes in the file, without the parts."""
        return self.stop - self.start

    @property
    def stored_as(self) -> str:
        """What its bytes are: the dtype, or the label of the encoding."""
        return self.dtype if self.encoding is None else self.encoding.label

    @property
    def n_params(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def in_file(self, file: Source) -> "TensorInfo":
        """The tensor at the same place of another file with the same header."""
        return TensorInfo(
            self.name, self.dtype, self.shape, file, self.start, self.stop, self.encoding, self.parts, self.listed
        )


def n_bytes_of(dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor takes in a file.

    Example:
        >>> n_bytes_of("BF16", (3, 5))
        30
    """
    return math.prod(shape) * DTYPE_BITS[dtype] // 8
