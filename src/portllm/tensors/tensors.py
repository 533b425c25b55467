"""Bytes of a checkpoint to tensors and back: the only place that knows how a dtype's name maps to torch."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from portllm.errors import UnsupportedDtypeError
from portllm.tensors.bytes import read_bytes
from portllm.tensors.info import TensorInfo, n_bytes_of
from portllm.tensors.windows import load_values

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def torch_dtype(dtype: str) -> torch.dtype:
    """The dtype of torch by its name in a header.

    Raises:
        UnsupportedDtypeError: torch has no such dtype.
    """
    if dtype not in TORCH_DTYPES:
        raise UnsupportedDtypeError(f"unsupported dtype {dtype}; expected one of {', '.join(TORCH_DTYPES)}.")
    return TORCH_DTYPES[dtype]


def decode(data: bytes | bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that these bytes stand for.

    Raises:
        UnsupportedDtypeError: torch has no such dtype.

    Example:
        >>> decode(bytes.fromhex("803f0040"), "BF16", (2,))
        tensor([1., 2.], dtype=torch.bfloat16)
    """
    if not data:
        return torch.empty(shape, dtype=torch_dtype(dtype))
    return torch.frombuffer(bytearray(data), dtype=torch_dtype(dtype)).reshape(shape)


def encode(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it is contiguous already."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def load(info: TensorInfo) -> Tensor:
    """One whole tensor."""
    if info.encoding is not None:
        return _load_decoded(info, 0, info.n_params, info.shape)
    return decode(read_bytes(info), info.dtype, info.shape)


def load_rows(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of a tensor, counted along its first axis."""
    shape = (stop - start, *info.shape[1:])
    if info.encoding is not None:
        width = math.prod(info.shape[1:])
        return _load_decoded(info, start * width, stop * width, shape)
    row_bytes = n_bytes_of(info.dtype, info.shape[1:])
    return decode(read_bytes(info, start * row_bytes, stop * row_bytes), info.dtype, shape)


def _load_decoded(info: TensorInfo, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(load_values(info, start, stop)).reshape(shape).to(TORCH_DTYPES[info.dtype])
