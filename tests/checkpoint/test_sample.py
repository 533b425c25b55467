"""Values without torch: each dtype against torch, and any part of a tensor."""

import numpy as np
import pytest
import torch

from portllm.checkpoint.decoding import decode_floats
from portllm.checkpoint.identity import SAMPLE_BYTES
from portllm.checkpoint.reader import open_checkpoint
from portllm.checkpoint.sample import load_values, sample_span
from portllm.checkpoint.tensors import TORCH_DTYPES, encode
from portllm.errors import UnsupportedDtypeError
from tests.files import BYTES_OF, write_tensors


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_values_are_those_of_torch(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -1.5, 3e-5, 65504.0, 2.0**-24, float("inf")]).to(TORCH_DTYPES[dtype])
    assert np.array_equal(decode_floats(bytes(encode(values)), dtype), values.float().numpy())


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "BOOL", "U16"])
def test_what_is_no_float_is_refused(dtype):
    with pytest.raises(UnsupportedDtypeError, match=f"dtype {dtype}: holds no numbers"):
        decode_floats(b"", dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_the_span_of_a_sample_is_its_window_in_elements(dtype, tmp_path):
    n = 5000
    values = torch.arange(n, dtype=torch.float64).to(TORCH_DTYPES[dtype])
    file = write_tensors(tmp_path / "m.safetensors", {"w": (dtype, (n,), bytes(encode(values)))})
    info = open_checkpoint(file).infos["w"]
    start, stop = sample_span(info)
    assert 0 <= start < stop <= n
    assert (stop - start) * BYTES_OF[dtype] == SAMPLE_BYTES
    assert np.array_equal(load_values(info, start, stop), values[start:stop].float().numpy())
    assert load_values(info, 3, 3).size == 0
