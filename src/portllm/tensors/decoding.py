"""From bytes to numbers, without torch: which bytes hold a range of elements, and what they stand for. Pure.

Every dtype and encoding answers two questions, so that reading stays apart: which spans of which tensors are needed
(`spans_of`), and what the values are once somebody has read them (`decoded`). A range costs what it needs and no more,
whatever the size of the tensor.

Sources: the blocks of GGUF are the `gguf` package's; the permutation is that of `LlamaModel.permute` in llama.cpp's
`convert_hf_to_gguf.py`; 4 bit, of bitsandbytes' `functional.QuantState` and `backends/default/ops.py`.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np

from portllm.arrays import Float32, Int64, UInt8
from portllm.errors import CheckpointError
from portllm.tensors.encoding import UNQUANTIZED, FourBit, GGMLBlocks, Scaled, Unread
from portllm.tensors.info import TensorInfo, n_bytes_of
from portllm.tensors.numbers import decode_floats, unpack_nibbles
from portllm.tensors.rounding import round_to
from portllm.tensors.scaled import from_scaled, scaled_spans

Span = tuple[TensorInfo, int, int]
"""A stored tensor, and the first and one past the last byte of it that is needed."""


def spans_of(info: TensorInfo, start: int, stop: int) -> list[Span]:
    """What has to be read for the elements `start` to `stop` of a tensor in row-major order.

    Example:
        >>> from pathlib import Path
        >>> from portllm.files.source import LocalFile
        >>> info = TensorInfo("w", "F32", (3, 64), LocalFile(Path("m.gguf")), 0, 102, GGMLBlocks("Q8_0", 32, 34))
        >>> [span[1:] for span in spans_of(info, 40, 70)]
        [(34, 102)]
    """
    match info.encoding:
        case None:
            return [(info, n_bytes_of(info.dtype, (start,)), n_bytes_of(info.dtype, (stop,)))]
        case GGMLBlocks() as blocks:
            first, last = _blocks_of(info, blocks, start, stop)
            return [(info, first * blocks.n_bytes, last * blocks.n_bytes)]
        case FourBit() as four_bit:
            return _four_bit_spans(info, four_bit, start, stop)
        case Scaled() as scaled:
            return scaled_spans(info, scaled, start, stop)
        case Unread(scheme):
            raise CheckpointError(
                f"'{info.file}': '{info.name}' is stored by {scheme}, which cannot be dequantized. Use the model in "
                "16 bit."
            )


def decoded(info: TensorInfo, start: int, stop: int, data: Sequence[bytes]) -> Float32[np.ndarray, " n"]:
    """The elements `start` to `stop`, from what was read of each span that `spans_of` named.

    Raises:
        UnsupportedDtypeError: The tensor does not hold floating-point numbers of 16, 32 or 64 bits.
        CheckpointError: Its storage type cannot be dequantized.
    """
    match info.encoding:
        case None:
            return decode_floats(data[0], info.dtype)
        case GGMLBlocks() as blocks:
            return _from_blocks(info, blocks, start, stop, data[0])
        case FourBit() as four_bit:
            return _from_four_bit(info, four_bit, start, stop, data)
        case Scaled() as scaled:
            return from_scaled(info, scaled, start, stop, data)
        case Unread():
            raise AssertionError("has no spans")


def stored_rows(rows: Int64[np.ndarray, " n"], *, n_rows: int, n_heads: int) -> Int64[np.ndarray, " n"]:
    """For rows of a query or key projection as transformers orders them, the rows of the GGUF file that hold them.

    Within a head of `2 h` rows, rotary embedding turns row `i` together with row `i + h`. llama.cpp stores the two
    side by side, as rows `2 i` and `2 i + 1`.

    Example:
        >>> stored_rows(np.arange(8), n_rows=8, n_heads=2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    head_rows = n_rows // n_heads
    head, row = np.divmod(rows, head_rows)
    upper, pair = np.divmod(row, head_rows // 2)
    return cast(np.ndarray, head * head_rows + 2 * pair + upper)


def _blocks_of(info: TensorInfo, blocks: GGMLBlocks, start: int, stop: int) -> tuple[int, int]:
    """The range of stored blocks that holds these elements; for reordered rows, all between the first and the last."""
    if not blocks.heads or start == stop:
        return start // blocks.elements, -(-stop // blocks.elements)
    rows = _rows_of(info, blocks, start, stop)
    per_row = _width(info) // blocks.elements
    return int(rows.min()) * per_row, (int(rows.max()) + 1) * per_row


def _rows_of(info: TensorInfo, blocks: GGMLBlocks, start: int, stop: int) -> Int64[np.ndarray, " n"]:
    rows = np.arange(start // _width(info), -(-stop // _width(info)), dtype=np.int64)
    return stored_rows(rows, n_rows=info.shape[0], n_heads=blocks.heads)


def _width(info: TensorInfo) -> int:
    """Elements of a row; those of a vector are rows of one."""
    return info.n_params // info.shape[0]


def _from_blocks(info: TensorInfo, blocks: GGMLBlocks, start: int, stop: int, data: bytes) -> Float32[np.ndarray, " n"]:
    if start == stop:
        return np.empty(0, np.float32)
    first, _ = _blocks_of(info, blocks, start, stop)
    if blocks.heads:
        width = _width(info)
        stored = np.frombuffer(data, np.uint8).reshape(-1, width // blocks.elements * blocks.n_bytes)
        rows = _rows_of(info, blocks, start, stop) - first * blocks.elements // width
        values = _dequantized(stored[rows], info, blocks)
        before = start // width * width
    else:
        values = _dequantized(np.frombuffer(data, np.uint8).reshape(-1, blocks.n_bytes), info, blocks)
        before = first * blocks.elements
    wanted = values[start - before : stop - before]
    return wanted - np.float32(blocks.offset) if blocks.offset else wanted


def _dequantized(
    stored: UInt8[np.ndarray, "rows bytes"], info: TensorInfo, blocks: GGMLBlocks
) -> Float32[np.ndarray, " n"]:
    if blocks.type in UNQUANTIZED:
        return decode_floats(stored.tobytes(), blocks.type)
    from gguf import GGMLQuantizationType, dequantize  # takes long to import, and few runs need it

    try:
        with np.errstate(all="ignore"):  # a damaged scale may be no number; the values then say so
            values = dequantize(stored, GGMLQuantizationType[blocks.type])
    except (NotImplementedError, KeyError) as error:
        raise CheckpointError(
            f"'{info.file}': tensor '{info.name}' is stored as {blocks.type}, which cannot be dequantized. Use a "
            "file with another quantization."
        ) from error
    return np.ascontiguousarray(values, dtype=np.float32).reshape(-1)


def _four_bit_spans(info: TensorInfo, four_bit: FourBit, start: int, stop: int) -> list[Span]:
    parts = dict(info.parts)
    first, last = start // four_bit.block_size, -(-stop // four_bit.block_size)
    scales, code = parts[".absmax"], parts[".quant_map"]
    width = n_bytes_of(scales.dtype, (1,))
    spans: list[Span] = [(info, start // 2, -(-stop // 2))]
    spans += [(code, 0, code.n_bytes), (scales, first * width, last * width)]
    if four_bit.nested_block_size:
        nested, nested_code = parts[".nested_absmax"], parts[".nested_quant_map"]
        ends = (4 * (first // four_bit.nested_block_size), 4 * -(-last // four_bit.nested_block_size))
        spans += [(nested_code, 0, nested_code.n_bytes), (nested, *ends)]
    return spans


def _from_four_bit(
    info: TensorInfo, four_bit: FourBit, start: int, stop: int, data: Sequence[bytes]
) -> Float32[np.ndarray, " n"]:
    packed, code, scales, *nested = data
    first, last = start // four_bit.block_size, -(-stop // four_bit.block_size)
    if nested:
        nested_code, nested_scales = (decode_floats(part, "F32") for part in nested)
        group = np.arange(first, last) // four_bit.nested_block_size - first // four_bit.nested_block_size
        absmax = nested_code[np.frombuffer(scales, np.uint8)] * nested_scales[group]
        absmax = absmax + np.float32(four_bit.nested_offset)
    else:
        absmax = decode_floats(scales, "F32")
    values = decode_floats(code, "F32")[unpack_nibbles(np.frombuffer(packed, np.uint8))]
    values = values[start % 2 :][: stop - start]
    block = np.arange(start, stop) // four_bit.block_size - first
    return round_to(values * absmax[block], info.dtype)
