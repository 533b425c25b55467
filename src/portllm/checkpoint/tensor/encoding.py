"""How a tensor's bytes stand for its values where they are not the values themselves. Values, no reading.

Two kinds of files hold weights so: GGUF, in blocks along a row, and what bitsandbytes saves of a model in 4 bit.
`portllm.checkpoint.reading.decoding` does the arithmetic.
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


Encoding = GGMLBlocks | FourBit
"""How the bytes of a tensor stand for its values; `TensorInfo.encoding` is None where they are the values."""


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
