"""From codes and their scales to numbers: which bytes hold some rows of a matrix, and what they stand for. Pure.

Most schemes store a matrix row by row, so that a range of it costs what it needs. AWQ, GPTQ and the experts of GPT-OSS
store it column by column: a row then lies all over the tensor, which is read whole for any of its rows.

Sources: `_dequantize_one` in transformers' `integrations/finegrained_fp8.py` and `convert_moe_packed_tensors` in its
`integrations/mxfp4.py`; `dequantize_gemm` and `dequantize_weight` in GPTQModel; `decompress` of the compressors in
compressed-tensors.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from portllm.arrays import Float32, Int64, Shaped
from portllm.errors import CheckpointError
from portllm.tensors.encoding import Grid, Scaled
from portllm.tensors.info import TensorInfo
from portllm.tensors.numbers import E2M1, decode_numbers, unpack
from portllm.tensors.rounding import round_to

WORD_CODES = 32
"""Codes that fill a whole number of words of 32 bits, whatever their size."""


def scaled_spans(info: TensorInfo, scaled: Scaled, start: int, stop: int) -> list[tuple[TensorInfo, int, int]]:
    """What has to be read for elements `start` to `stop`: one span for each grid, then the groups where they are said.

    Example:
        >>> from pathlib import Path
        >>> from portllm.files.source import LocalFile
        >>> file = LocalFile(Path("m.safetensors"))
        >>> scale = TensorInfo("w_scale_inv", "F32", (2, 4), file, 0, 32)
        >>> scaled = Scaled("fp8", 200, 512, Grid("", "F8_E4M3"), (Grid("_scale_inv", "F32", 128, 128),))
        >>> info = TensorInfo("w", "F32", (200, 512), file, 32, 102432, scaled, (("_scale_inv", scale),))
        >>> [span[1:] for span in scaled_spans(info, scaled, 130 * 512 + 7, 131 * 512)]
        [(66560, 67072), (16, 32)]
    """
    if start == stop:
        return []
    parts = {"": info, **dict(info.parts)}
    first, last = _rows(scaled, start, stop)
    spans = []
    for grid in scaled.grids:
        part = parts[grid.part]
        below, above = _lines(scaled, grid, first, last)
        size = part.n_bytes // _n_lines(scaled, grid, info.n_params)
        spans.append((part, below * size, above * size))
    if scaled.groups:
        spans.append((parts[scaled.groups], 0, parts[scaled.groups].n_bytes))
    return spans


def from_scaled(
    info: TensorInfo, scaled: Scaled, start: int, stop: int, data: Sequence[bytes]
) -> Float32[np.ndarray, " n"]:
    """The elements `start` to `stop`, from what was read of the spans that `scaled_spans` named."""
    if start == stop:
        return np.empty(0, np.float32)
    first, last = _rows(scaled, start, stop)
    group = _groups(info, scaled, data[-1]) if scaled.groups else None
    found = [_numbers(scaled, grid, part, first, last, group) for grid, part in zip(scaled.grids, data, strict=False)]
    values, rest = found[0], iter(found[1:])
    scales = [next(rest) for _ in scaled.scales]
    for _ in scaled.divisors:
        scales[0] = scales[0] / next(rest)
    if scaled.zeros is not None:
        values = values - next(rest)
    if scaled.zero:
        values = values - np.float32(scaled.zero)
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged scale may be no number; the values then say so
        if scales:
            factor = scales[0]
            for scale in scales[1:]:
                factor = factor * scale
            values = values * factor
        if scaled.factor != 1:
            values = values * np.float32(scaled.factor)
    before = first * scaled.columns
    return round_to(np.ascontiguousarray(values).reshape(-1), info.dtype)[start - before : stop - before]


def _groups(info: TensorInfo, scaled: Scaled, data: bytes) -> Shaped[np.ndarray, " columns"]:
    """In which group each column is."""
    groups = np.frombuffer(data, "<i4")
    n_groups = -(-scaled.columns // scaled.scales[0].width)
    if groups.min() < 0 or groups.max() >= n_groups:
        raise CheckpointError(
            f"'{info.file}': '{info.name}' has columns in group {groups.max()}, and {n_groups} groups. The file is "
            "corrupt: download or save it again."
        )
    return groups


def _rows(scaled: Scaled, start: int, stop: int) -> tuple[int, int]:
    """The range of rows, over all matrices, that holds these elements."""
    return start // scaled.columns, -(-stop // scaled.columns)


def _grid_rows(scaled: Scaled, grid: Grid) -> int:
    """Rows that a grid has for one matrix."""
    return -(-scaled.rows // grid.height)


def _n_lines(scaled: Scaled, grid: Grid, n_params: int) -> int:
    """Parts of a stored tensor that are read apart: a row of the grid, or all that is of one matrix."""
    matrices = n_params // (scaled.rows * scaled.columns)
    return matrices if grid.is_whole else matrices * _grid_rows(scaled, grid)


def _lines(scaled: Scaled, grid: Grid, first: int, last: int) -> tuple[int, int]:
    """Which of those parts hold a range of rows."""
    if grid.is_whole:
        return first // scaled.rows, -(-last // scaled.rows)
    return _line(scaled, grid, first), _line(scaled, grid, last - 1) + 1


def _line(scaled: Scaled, grid: Grid, row: int) -> int:
    return row // scaled.rows * _grid_rows(scaled, grid) + row % scaled.rows // grid.height


def _numbers(
    scaled: Scaled, grid: Grid, data: bytes, first: int, last: int, group: Shaped[np.ndarray, " columns"] | None
) -> Float32[np.ndarray, "rows columns"]:
    """The number that a grid has for each element of some rows; one column where all columns share it."""
    below, above = _lines(scaled, grid, first, last)
    lines = np.frombuffer(data, np.uint8).reshape(above - below, -1)
    width = -(-scaled.columns // grid.width)
    if grid.is_whole:
        parts = [
            _from_whole(scaled, grid, line, lower, upper)
            for line, (lower, upper) in zip(lines, _per_matrix(scaled, first, last), strict=True)
        ]
        values = np.concatenate(parts) if len(parts) > 1 else parts[0]
    else:
        values = _decoded(lines, grid)[:, :width]
        if len(values) != last - first:
            rows = np.arange(first, last)
            lines_of = rows // scaled.rows * _grid_rows(scaled, grid) + rows % scaled.rows // grid.height
            values = values[lines_of - below]
    if width == 1 or (grid.width == 1 and group is None):
        return values
    if group is not None and grid is not scaled.codes:
        return values[:, group]
    return values[:, np.arange(scaled.columns) // grid.width] if grid.width > 1 else values


def _per_matrix(scaled: Scaled, first: int, last: int) -> Iterator[tuple[int, int]]:
    """A range of rows over all matrices as ranges of each that it touches."""
    for matrix in range(first // scaled.rows, -(-last // scaled.rows)):
        start = matrix * scaled.rows
        yield max(first - start, 0), min(last - start, scaled.rows)


def _from_whole(
    scaled: Scaled, grid: Grid, stored: Shaped[np.ndarray, " bytes"], first: int, last: int
) -> Float32[np.ndarray, "rows width"]:
    """The numbers for rows `first` to `last` of one matrix, of which everything is there."""
    height, width = _grid_rows(scaled, grid), -(-scaled.columns // grid.width)
    rows = np.arange(first, last, dtype=np.int64) // grid.height
    if not grid.transposed:  # packed down the rows
        words = stored.view("<u4").reshape(-1, width)
        codes = unpack(np.ascontiguousarray(words.T).view(np.uint8), grid.bits)[:, :height]
        return _codes(codes.T[rows], grid)
    if grid.bits == 0:
        return decode_numbers(stored.tobytes(), grid.dtype).reshape(width, height).T[rows]
    if grid.packed_axis == 0:  # down what is stored as rows, which are the columns of the matrix
        words = stored.view("<u4").reshape(-1, height)
        return _codes(unpack(_taken(words, rows).view(np.uint8), grid.bits)[:, :width], grid)
    lower = int(rows[0]) // WORD_CODES * WORD_CODES
    upper = -(-(int(rows[-1]) + 1) // WORD_CODES) * WORD_CODES
    part = np.ascontiguousarray(stored.reshape(width, -1)[:, lower * grid.bits // 8 : upper * grid.bits // 8])
    return _codes(_ordered(unpack(part, grid.bits), grid).T[rows - lower], grid)


def _taken(words: Shaped[np.ndarray, "n columns"], columns: Int64[np.ndarray, " k"]) -> Shaped[np.ndarray, "k n"]:
    return np.ascontiguousarray(words[:, columns].T)


def _decoded(lines: Shaped[np.ndarray, "lines bytes"], grid: Grid) -> Float32[np.ndarray, "lines n"]:
    if grid.bits:
        return _codes(_ordered(unpack(lines, grid.bits), grid), grid)
    return decode_numbers(lines.tobytes(), grid.dtype).reshape(len(lines), -1)


def _ordered(codes: Shaped[np.ndarray, "lines n"], grid: Grid) -> Shaped[np.ndarray, "lines n"]:
    if not grid.order:
        return codes
    return codes.reshape(len(codes), -1, len(grid.order))[:, :, list(grid.order)].reshape(len(codes), -1)


def _codes(codes: Shaped[np.ndarray, "lines n"], grid: Grid) -> Float32[np.ndarray, "lines n"]:
    if grid.dtype == "F4_E2M1":
        return cast(np.ndarray, E2M1[codes])
    if grid.plus:
        codes = (codes + grid.plus) & ((1 << grid.bits) - 1)
    return codes.astype(np.float32)
