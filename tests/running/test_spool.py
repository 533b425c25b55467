"""Room on disk: the values that were kept, one room for one purpose, and a full disk that is an error."""

import ctypes
import errno
import os
from pathlib import Path

import pytest
import torch

from portllm.errors import OutputError
from portllm.running.spool import MAPPED_BYTES, Spool, give_back_freed

LARGE = MAPPED_BYTES // torch.float32.itemsize


@pytest.mark.parametrize("shape", [(3, 5), (LARGE, 2)])
def test_what_is_kept_are_the_values_and_no_file_is_seen(shape, tmp_path):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    kept = Spool(tmp_path).keep("here", values)
    assert torch.equal(kept, values)
    assert kept.data_ptr() != values.data_ptr()
    assert list(tmp_path.iterdir()) == []


def test_a_purpose_has_one_room_as_long_as_its_shape_is_the_same(tmp_path):
    spool = Spool(tmp_path)
    first = spool.room(("x", 0), LARGE, 2)
    assert spool.room(("x", 0), LARGE, 2).data_ptr() == first.data_ptr()
    assert spool.room(("x", 1), LARGE, 2).data_ptr() != first.data_ptr()
    assert spool.room(("x", 0), LARGE, 3).shape == (LARGE, 3)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no room")
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        OutputError, match=rf"'{tmp_path}': no room for .* \(No space left on device\)\. Free some disk"
    ):
        Spool(tmp_path).room("x", LARGE, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc, which holds what was freed")
def test_what_was_freed_is_given_back():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    several = [torch.ones(20_000) for _ in range(2_000)]  # each too small for a mapping of its own
    last = torch.ones(20_000)  # lies behind them, so that the heap cannot simply end earlier
    del several
    before = resident()
    give_back_freed()
    assert before - resident() > 80e6
    assert last.sum() == 20_000
