"""Rows read into memory that is used again."""

import pytest
import torch

from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError, UnsupportedDtypeError
from portllm.files import page_cache
from portllm.tensors.rows import RowReader
from portllm.tensors.tensors import load, load_rows
from tests.safetensors_files import write_tensors


@pytest.fixture
def infos(tmp_path):
    tensors = {
        "w": ("F32", (7, 3), torch.arange(21.0).numpy().tobytes()),
        "scalar": ("I64", (), bytes(8)),
        "empty": ("F32", (0, 3), b""),
        "packed": ("F8_E8M0", (2,), bytes(2)),
    }
    return open_checkpoint(write_tensors(tmp_path / "m.safetensors", tensors)).infos


@pytest.mark.parametrize("keep_cached", [True, False])
@pytest.mark.parametrize("step", [5, 1 << 24])
def test_rows_are_those_of_the_tensor_whatever_was_read_before(keep_cached, step, infos, monkeypatch):
    monkeypatch.setattr(page_cache, "STEP_BYTES", step)
    with RowReader(keep_cached=keep_cached) as reader:
        for start, stop in ((0, 7), (2, 3), (5, 7), (0, 1)):
            assert reader.rows(infos["w"], start, stop).equal(load_rows(infos["w"], start, stop))
        assert reader.rows(infos["scalar"], 0, 1).equal(load(infos["scalar"]))
        assert reader.rows(infos["empty"], 0, 0).shape == (0, 3)
        assert reader.rows(infos["w"], 0, 2).equal(load_rows(infos["w"], 0, 2))


def test_memory_is_used_again(infos):
    with RowReader() as reader:
        first = reader.rows(infos["w"], 0, 4)
        assert reader.rows(infos["w"], 3, 5).data_ptr() == first.data_ptr()


def test_bytes_of_a_dtype_that_is_not_computed_with_are_read_and_its_values_refused(infos):
    with RowReader() as reader:
        assert reader.span(infos["packed"], 1, 2) == bytes(1)
        with pytest.raises(UnsupportedDtypeError, match="dtype F8_E8M0"):
            reader.rows(infos["packed"], 0, 2)


def test_a_file_that_is_gone_or_cut_short_is_told(infos):
    (file,) = {info.file.path for info in infos.values()}
    with RowReader() as reader:
        reader.rows(infos["w"], 0, 1)
        file.write_bytes(file.read_bytes()[:-4])
        last = max(infos.values(), key=lambda info: info.stop)
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            reader.span(last, 0, last.n_bytes)
        file.unlink()
        with pytest.raises(CheckpointError, match="cannot read"):
            reader.rows(infos["scalar"], 0, 1)
