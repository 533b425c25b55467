"""Values without torch: each dtype against torch, and any part of a tensor."""

import numpy as np
import pytest
import torch

from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError, UnsupportedDtypeError
from portllm.files.input_file import open_unchanged
from portllm.files.source import LocalFile
from portllm.tensors import bytes as raw_files
from portllm.tensors.numbers import decode_floats
from portllm.tensors.tensors import TORCH_DTYPES, encode
from portllm.tensors.windows import SAMPLE_BYTES, load_spans, load_values, sample_span
from tests.safetensors_files import BYTES_OF, write_tensors


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_values_are_those_of_torch(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -1.5, 3e-5, 65504.0, 2.0**-24, float("inf")]).to(TORCH_DTYPES[dtype])
    assert np.array_equal(decode_floats(bytes(encode(values)), dtype), values.float().numpy())


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "BOOL", "U16"])
def test_what_is_no_float_is_refused(dtype):
    with pytest.raises(UnsupportedDtypeError, match=f"dtype {dtype}: cannot be sampled"):
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


def test_spans_of_one_file_are_read_with_one_opening_and_an_error_names_the_tensor(tmp_path, monkeypatch):
    opened = []

    def counted(*how, **more):
        opened.append(how)
        return open_unchanged(*how, **more)

    monkeypatch.setattr(raw_files, "open_unchanged", counted)
    values = {name: ("F32", (4,), np.full(4, number, "<f4").tobytes()) for number, name in enumerate("abc")}
    file = write_tensors(tmp_path / "m.safetensors", values)
    infos = open_checkpoint(file).infos
    opened.clear()
    spans = [(infos[name], 1, 3) for name in "cab"]
    assert [found.tolist() for found in load_spans(spans)] == [[2.0, 2.0], [0.0, 0.0], [1.0, 1.0]]
    assert len(opened) == 1
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="'c': .* ended at 0 of 8 bytes"):
        list(load_spans([(infos[name].in_file(LocalFile(file)), 1, 3) for name in "abc"]))
