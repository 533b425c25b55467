"""Tied heads: absent, stored twice, and stored once but different."""

import json
import os

import pytest

from portllm.checkpoint.model.equality import require_equal
from portllm.checkpoint.model.identity import digest, fingerprint
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import PlanRefusedError
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
    assert opened.tied_embedding == opened.embedding == opened.infos[EMBEDDING]


def test_a_copy_of_the_embedding_is_tied_when_the_configuration_says_so(tmp_path):
    assert model(tmp_path, head=VALUES).tied_embedding.name == EMBEDDING


@pytest.mark.parametrize("tied", [False, None, 1, "true"])
def test_a_copy_of_the_embedding_is_a_head_of_its_own_unless_the_configuration_ties_it(tied, tmp_path):
    assert model(tmp_path, head=VALUES, tied=tied).tied_embedding is None


@pytest.mark.parametrize(
    "head",
    [
        {"head": VALUES[:-1] + b"x"},
        {"head": VALUES, "shape": (6, 5)},
        {"head": VALUES, "dtype": "F16"},
    ],
)
def test_a_head_that_is_no_copy_is_its_own(head, tmp_path):
    assert model(tmp_path, **head).tied_embedding is None


@pytest.fixture
def large(tmp_path):
    """A model whose head is its embedding but for one byte, at a place."""

    def write(place):
        head = bytearray(1 << 18)
        head[place] = 1
        tensors = {EMBEDDING: ("U8", (1 << 18,), bytes(1 << 18)), "lm_head.weight": ("U8", (1 << 18,), bytes(head))}
        folder = tmp_path / str(place)
        folder.mkdir()
        write_tensors(folder / "model.safetensors", tensors)
        (folder / "config.json").write_text('{"tie_word_embeddings": true}')
        return open_checkpoint(folder)

    return write


@pytest.mark.parametrize("place", [0, -1])
def test_samples_of_a_head_lie_at_its_ends_too(place, large):
    assert large(place).tied_embedding is None


def test_a_head_that_differs_where_no_sample_lies_is_seen_when_it_is_compared_whole(large):
    opened = large(1 << 16)
    assert opened.tied_embedding.name == EMBEDDING
    with pytest.raises(PlanRefusedError, match="set tie_word_embeddings to false"):
        require_equal(opened.stored_twice)


def test_a_head_that_is_the_embedding_in_every_number_passes_when_it_is_compared_whole(tmp_path):
    told = []
    require_equal(model(tmp_path, head=VALUES).stored_twice, progress=lambda *now: told.append(now))
    assert told == [("compare: lm_head.weight", 120, 120, "bytes")]


def test_the_digest_counts_a_head_that_differs_where_no_sample_lies_and_the_fingerprint_does_not(large):
    marks = [(fingerprint(opened), digest(opened)) for opened in (large(1 << 16), large((1 << 16) + 1))]
    assert marks[0][0] == marks[1][0]
    assert marks[0][1] != marks[1][1]


@pytest.mark.parametrize(("head", "tied"), [(None, True), (VALUES, False), (VALUES[::-1], True)])
def test_there_is_nothing_to_compare_where_one_matrix_is_stored_or_the_head_is_its_own(head, tied, tmp_path):
    assert model(tmp_path, head=head, tied=tied).stored_twice == ()


def test_a_copy_in_a_wider_dtype_is_tied_and_one_with_other_numbers_is_not(tmp_path):
    bf16 = bytes(range(60))
    f32 = b"".join(b"\0\0" + bf16[place : place + 2] for place in range(0, 60, 2))
    (tmp_path / "same").mkdir()
    (tmp_path / "other").mkdir()
    same = model(tmp_path / "same", head=f32, dtype="F32")
    assert same.tied_embedding.name == EMBEDDING
    assert fingerprint(same) == fingerprint(model(tmp_path, head=None))
    assert model(tmp_path / "other", head=f32[:-4] + b"\1" + f32[-3:], dtype="F32").tied_embedding is None


def test_a_file_that_was_written_again_is_compared_again(tmp_path):
    assert model(tmp_path, head=VALUES).tied_embedding is not None
    model(tmp_path, head=VALUES[:-1] + b"x")
    os.utime(tmp_path / "model.safetensors", ns=(0, 1))  # the clock of the disk may not have moved between the two
    assert open_checkpoint(tmp_path).tied_embedding is None


def test_a_model_without_an_embedding_has_no_tied_head(tmp_path):
    write_tensors(tmp_path / "model.safetensors", {"w": ("F32", (1,), b"abcd")})
    assert open_checkpoint(tmp_path).tied_embedding is None
