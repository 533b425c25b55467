"""How a tensor's bytes stand for its values where they are not the values themselves. Values, no reading.

Files hold weights so in GGUF, in blocks along a row; as bitsandbytes saves a model in 4 bit; and as codes of few bits
beside their scales, which is what all other schemes do (FP8, MXFP4, AWQ, GPTQ, compressed-tensors).
`portllm.tensors.decoding` does the arithmetic.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

BLOCK_SIZE = 64
"""Elements that share a scale in bitsandbytes' 4-bit formats, unless something else is asked for."""

NESTED_BLOCK_SIZE = 256
"""Scales that share a scale of their own where they are quantized too (`bnb_4bit_use_double_quant`)."""

GGML_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Storage types of GGUF by number: name, elements of a block, bytes of a block."""

UNREADABLE = frozenset({"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"})
"""Those that hold no weights, or only what a program computes with on the way."""

UNQUANTIZED = frozenset({"F32", "F16", "BF16"})
"""Those that hold each value by itself."""


@dataclass(frozen=True, slots=True)
class GGMLBlocks:
    """A tensor of a GGUF file.

    Attributes:
        type: Its storage type, such as `Q4_K`.
        elements: Elements of a block, which lie along a row.
        n_bytes: Bytes of a block.
        heads: Heads whose rows llama.cpp reordered for rotary embedding; 0 where it left the rows alone.
        offset: What llama.cpp added to every value.
    """

    type: str
    elements: int
    n_bytes: int
    heads: int = 0
    offset: float = 0.0

    @property
    def label(self) -> str:
        """What stands for the dtype in the model's identity: all that the values depend on besides the bytes.

        Example:
            >>> GGMLBlocks("Q4_K", 256, 144, heads=4).label, GGMLBlocks("F32", 1, 4, offset=1.0).label
            ('ggml Q4_K heads 4', 'ggml F32 plus 1')
        """
        heads = f" heads {self.heads}" if self.heads else ""
        return f"ggml {self.type}{heads}" + (f" plus {self.offset:g}" if self.offset else "")

    @property
    def scheme(self) -> str:
        """What people call it."""
        return self.type


@dataclass(frozen=True, slots=True)
class FourBit:
    """A weight as bitsandbytes stores it in 4 bit: two elements a byte, and for each block of elements a scale.

    Attributes:
        kind: `nf4` or `fp4`.
        block_size: Elements that share a scale.
        nested_block_size: Scales that share a scale of their own; 0 where they are float32.
        nested_offset: What was subtracted from the scales before they were quantized.
    """

    kind: str
    block_size: int = BLOCK_SIZE
    nested_block_size: int = 0
    nested_offset: float = 0.0

    @property
    def label(self) -> str:
        """What stands for the dtype in the model's identity."""
        return f"bitsandbytes {self.scheme}"

    @property
    def scheme(self) -> str:
        """What people call it.

        Example:
            >>> FourBit("nf4").scheme, FourBit("fp4", 128, 256).scheme
            ('nf4', 'fp4-double-128')
        """
        return scheme_name(self.kind, is_double=bool(self.nested_block_size), block_size=self.block_size)


@dataclass(frozen=True, slots=True)
class Grid:
    """How the numbers of one stored tensor lie over a matrix: one for each of its elements, or for each block of them.

    Attributes:
        part: What follows the weight's name in `TensorInfo.parts`; empty for the bytes of the tensor itself.
        dtype: How each number is stored: a dtype of headers, `F4_E2M1` (half a byte), or `INT` (packed, without sign).
        height: Rows of the matrix that share a number.
        width: Columns that share a number.
        bits: Bits of a packed number, the first one lowest in its byte; 0 where each has bytes of its own.
        packed_axis: The stored axis along which numbers share bytes.
        transposed: Whether the matrix is stored with its columns as rows.
        order: For each number of a word of 32 bits, which place in it is its; empty where it is its own.
        plus: What is added to a packed number, which then starts again at zero where it has no room.
    """

    part: str
    dtype: str
    height: int = 1
    width: int = 1
    bits: int = 0
    packed_axis: int = 1
    transposed: bool = False
    order: tuple[int, ...] = ()
    plus: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether a row of the matrix lies all over the stored tensor, so that no part of it has that row."""
        return self.transposed or (self.bits > 0 and self.packed_axis == 0)


@dataclass(frozen=True, slots=True)
class Scaled:
    """A weight as codes of few bits, and scales for blocks of them: `W = (code - zero) * scale`.

    Attributes:
        scheme: What people call it.
        rows: Of the matrix; a tensor of experts is one matrix after the other.
        columns: Of the matrix.
        codes: The codes.
        scales: What they are multiplied by.
        divisors: What the first of the scales is divided by.
        zeros: What is subtracted from the codes.
        zero: What is subtracted besides, from every code.
        groups: The part that says which column is in which group; empty where groups follow each other.
        factor: What every value is multiplied by at last.
    """

    scheme: str
    rows: int
    columns: int
    codes: Grid
    scales: tuple[Grid, ...] = ()
    divisors: tuple[Grid, ...] = ()
    zeros: Grid | None = None
    zero: int = 0
    groups: str = ""
    factor: float = 1.0

    @property
    def grids(self) -> tuple[Grid, ...]:
        """All grids, in the order in which they are read."""
        return (self.codes, *self.scales, *self.divisors, *(() if self.zeros is None else (self.zeros,)))

    @property
    def label(self) -> str:
        """What stands for the dtype in the model's identity.

        Example:
            >>> Scaled("fp8", 256, 512, Grid("", "F8_E4M3"), (Grid("_scale_inv", "F32", 128, 128),)).label
            'fp8 128x128'
        """
        blocks = "".join(f" {scale.height}x{scale.width}" for scale in self.scales)
        plus = f" plus {self.zeros.plus}" if self.zeros is not None and self.zeros.plus else ""
        return f"{self.scheme}{blocks}{plus}" + (f" minus {self.zero}" if self.zero else "")


@dataclass(frozen=True, slots=True)
class Unread:
    """A tensor of a model that is quantized in a way that is not known here: its values cannot be told.

    Attributes:
        scheme: What the model's configuration calls it.
        label: Its dtype, which stands for it in the model's identity.
    """

    scheme: str
    label: str


Encoding = GGMLBlocks | FourBit | Scaled | Unread
"""How the bytes of a tensor stand for its values; `TensorInfo.encoding` is None where they are the values."""


def is_plain(encoding: Encoding) -> bool:
    """Whether a tensor holds each value by itself, though in another order, or with something added."""
    return isinstance(encoding, GGMLBlocks) and encoding.type in UNQUANTIZED


def schemes_of(encodings: Iterable[Encoding | None]) -> str | None:
    """The names of these encodings, between commas; None where there is none.

    Where nothing is quantized, but some tensors are stored in another order, the storage types are named.

    Example:
        >>> schemes_of([GGMLBlocks("Q6_K", 256, 210), GGMLBlocks("Q4_K", 256, 144), GGMLBlocks("F32", 1, 4), None])
        'Q4_K, Q6_K'
    """
    schemes = {encoding.scheme for encoding in encodings if encoding is not None}
    return ", ".join(sorted(schemes - UNQUANTIZED or schemes)) or None


def scheme_name(kind: str, *, is_double: bool, block_size: int = BLOCK_SIZE) -> str:
    """The name of a way to quantize to 4 bit: `double` where the scales are quantized too, then another block size."""
    return kind + ("-double" if is_double else "") + (f"-{block_size}" if block_size != BLOCK_SIZE else "")
