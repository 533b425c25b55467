"""Tied heads: absent, stored twice, and stored once but different."""

import json
import os

import pytest

from portllm.checkpoint.model.identity import fingerprint
from portllm.checkpoint.model.ties import embedding, tied_embedding
from portllm.checkpoint.open import open_checkpoint
from tests.safetensors_files import write_tensors

EMBEDDING = "model.embed_tokens.weight"
VALUES = bytes(range(60))


def model(folder, *, head=None, tied=True, dtype="BF16", shape=(5, 6), embedding=VALUES):
    tensors = {EMBEDDING: ("BF16", (5, 6), embedding)}
    if head is not None:
        tensors["lm_head.weight"] = (dtype, shape, head)
    write_tensors(folder / "model.safetensors", tensors)
    if tied is not None:
        (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    return open_checkpoint(folder)


def test_a_head_that_is_not_stored_is_the_embedding(tmp_path):
    opened = model(tmp_path)
    assert tied_embedding(opened) == embedding(opened) == opened.infos[EMBEDDING]


def test_a_copy_of_the_embedding_is_tied_when_the_configuration_says_so(tmp_path):
    assert tied_embedding(model(tmp_path, head=VALUES)).name == EMBEDDING


@pytest.mark.parametrize("tied", [False, None, 1, "true"])
def test_a_copy_of_the_embedding_is_a_head_of_its_own_unless_the_configuration_ties_it(tied, tmp_path):
    assert tied_embedding(model(tmp_path, head=VALUES, tied=tied)) is None


@pytest.mark.parametrize(
    "head",
    [
        {"head": VALUES[:-1] + b"x"},
        {"head": VALUES, "shape": (6, 5)},
        {"head": VALUES, "dtype": "F16"},
    ],
)
def test_a_head_that_is_no_copy_is_its_own(head, tmp_path):
    assert tied_embedding(model(tmp_path, **head)) is None


@pytest.mark.parametrize("place", [0, 1 << 16, -1])
def test_a_difference_anywhere_is_seen(place, tmp_path):
    head = bytearray(1 << 18)
    head[place] = 1
    tensors = {EMBEDDING: ("U8", (1 << 18,), bytes(1 << 18)), "lm_head.weight": ("U8", (1 << 18,), bytes(head))}
    write_tensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    assert tied_embedding(open_checkpoint(tmp_path)) is None


def test_a_copy_in_a_wider_dtype_is_tied_and_one_with_other_numbers_is_not(tmp_path):
    bf16 = bytes(range(60))
    f32 = b"".join(b"\0\0" + bf16[place : place + 2] for place in range(0, 60, 2))
    (tmp_path / "same").mkdir()
    (tmp_path / "other").mkdir()
    same = model(tmp_path / "same", head=f32, dtype="F32")
    assert tied_embedding(same).name == EMBEDDING
    assert fingerprint(same) == fingerprint(model(tmp_path, head=None))
    assert tied_embedding(model(tmp_path / "other", head=f32[:-4] + b"\1" + f32[-3:], dtype="F32")) is None


def test_a_file_that_was_written_again_is_compared_again(tmp_path):
    assert tied_embedding(model(tmp_path, head=VALUES)) is not None
    model(tmp_path, head=VALUES[:-1] + b"x")
    os.utime(tmp_path / "model.safetensors", ns=(0, 1))  # the clock of the disk may not have moved between the two
    assert tied_embedding(open_checkpoint(tmp_path)) is None


def test_a_model_without_an_embedding_has_no_tied_head(tmp_path):
    write_tensors(tmp_path / "model.safetensors", {"w": ("F32", (1,), b"abcd")})
    assert tied_embedding(open_checkpoint(tmp_path)) is None
