"""Tied heads: absent, stored twice, and stored once but different."""

import json

import pytest

from portllm.checkpoint.reader import open_checkpoint
from portllm.checkpoint.ties import COMPARED_BYTES, embedding, tied_embedding
from tests.files import write_tensors

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


def test_a_difference_within_the_compared_bytes_is_seen(tmp_path):
    size = 2 * COMPARED_BYTES
    for number, place in enumerate((0, COMPARED_BYTES - 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        head = bytearray(size)
        head[place] = 1
        tensors = {EMBEDDING: ("U8", (size,), bytes(size)), "lm_head.weight": ("U8", (size,), bytes(head))}
        write_tensors(folder / "model.safetensors", tensors)
        (folder / "config.json").write_text('{"tie_word_embeddings": true}')
        assert tied_embedding(open_checkpoint(folder)) is None


def test_a_model_without_an_embedding_has_no_tied_head(tmp_path):
    write_tensors(tmp_path / "model.safetensors", {"w": ("F32", (1,), b"abcd")})
    assert tied_embedding(open_checkpoint(tmp_path)) is None
