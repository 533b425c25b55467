"""Tensors of one shape on top of each other: the values are those of the file, however many calls read them."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError, UnsupportedDtypeError
from portllm.files.source import LocalFile
from portllm.tensors import bytes as raw_files
from portllm.tensors.stacks import AlikeReader

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def written(tmp_path):
    """Writes tensors; gives their descriptions."""

    def write(tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        return open_checkpoint(tmp_path / "model.safetensors").infos

    return write


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_stack_has_the_values_of_its_tensors_in_order(written, dtype):
    tensors = {f"{name}.{kind}": torch.randn(3, 5 + kind).to(dtype) for name in "cab" for kind in (0, 1)}
    infos = written({**tensors, "apart": torch.zeros(1000)})
    stacks = [[infos[f"{name}.{kind}"] for name in "bca"] for kind in (0, 1)]
    for kind, found in enumerate(AlikeReader().read(*stacks)):
        wanted = torch.stack([tensors[f"{name}.{kind}"] for name in "bca"]).float()
        assert np.array_equal(found, wanted.numpy())


def test_stacks_of_other_dtypes_lie_beside_each_other(written):
    tensors = {"half": torch.randn(3, 3).half(), "double": torch.randn(2, 2).double()}
    infos = written(tensors)
    half, double = AlikeReader().read([infos["half"]], [infos["double"]])
    assert np.array_equal(half[0], tensors["half"].float().numpy())
    assert np.array_equal(double[0], tensors["double"].float().numpy())


def test_what_a_call_returned_is_overwritten_by_the_next(written):
    infos = written({"one": torch.ones(4), "two": torch.full((4,), 2.0)})
    reader = AlikeReader()
    (first,) = reader.read([infos["one"]])
    reader.read([infos["two"]])
    assert first.tolist() == [[2.0] * 4]


def test_tensors_that_follow_each_other_are_read_by_one_call(written, monkeypatch):
    infos = written({name: torch.randn(6) for name in "abcdef"})
    asked = []
    preadv = raw_files.os.preadv
    monkeypatch.setattr(raw_files.os, "preadv", lambda file, parts, at: asked.append(at) or preadv(file, parts, at))
    AlikeReader().read([infos["e"], infos["b"]], [infos["a"]])
    assert asked == [infos["a"].start, infos["e"].start]


def test_a_call_that_reads_less_is_followed_by_another(written, monkeypatch):
    tensors = {name: torch.randn(6) for name in "abc"}
    infos = written(tensors)
    preadv = raw_files.os.preadv
    monkeypatch.setattr(raw_files.os, "preadv", lambda file, parts, at: preadv(file, [parts[0][:7]], at))
    (found,) = AlikeReader().read(list(infos.values()))
    assert np.array_equal(found, torch.stack(list(tensors.values())).numpy())


def test_empty_tensors_have_no_values(written):
    infos = written({"none": torch.zeros(0, 4), "some": torch.ones(2, 4)})
    none, some = AlikeReader().read([infos["none"]], [infos["some"]])
    assert (none.shape, some.sum()) == ((1, 0, 4), 8.0)


def test_a_file_that_became_shorter_is_named_with_the_first_tensor_that_is_not_whole(written):
    infos = written({name: torch.randn(100) for name in "abc"})
    file = infos["b"].file.path
    infos = {name: info.in_file(LocalFile(file)) for name, info in infos.items()}
    file.write_bytes(file.read_bytes()[: infos["b"].stop - 1])
    with pytest.raises(CheckpointError, match=r"'b'.*became shorter"):
        AlikeReader().read(list(infos.values()))


def test_what_holds_no_numbers_is_refused(written):
    info = written({"w": torch.arange(4)})["w"]
    with pytest.raises(UnsupportedDtypeError):
        AlikeReader().read([info])
