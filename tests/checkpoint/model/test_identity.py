"""Fingerprint and digest: what they depend on and what not, and the cache of digests."""

import json
import os

import pytest

from portllm.checkpoint.model import identity
from portllm.checkpoint.model.identity import digest, fingerprint, tensor_digests
from portllm.checkpoint.open import open_checkpoint
from portllm.files.seal import render_sealed
from portllm.tensors.windows import SAMPLE_BYTES, sample_window
from tests.safetensors_files import write_tensors

BIG = bytes(index * 7 % 256 for index in range(3 * SAMPLE_BYTES))
EMBEDDING = "model.embed_tokens.weight"
TENSORS = {
    EMBEDDING: ("BF16", (5, 2), bytes(range(20))),
    "model.layers.0.mlp.up_proj.weight": ("F32", (SAMPLE_BYTES // 4, 3), BIG),
    "model.norm.weight": ("F16", (2,), b"abcd"),
}
BIG_NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PORTLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path):
    """Writes tensors as a model, in one file or in a shard each, and opens it."""

    def write(tensors, *, folder="model", shards=False, tied=None, metadata=None):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        if tied is not None:
            (place / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        if not shards:
            write_tensors(place / "model.safetensors", tensors, metadata=metadata)
            return open_checkpoint(place)
        files = {name: f"part-{number}.safetensors" for number, name in enumerate(tensors)}
        for name, file in files.items():
            write_tensors(place / file, {name: tensors[name]}, metadata=metadata)
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        return open_checkpoint(place)

    return write


def changed(name, *, dtype=None, shape=None, data=None):
    old = TENSORS[name]
    return {**TENSORS, name: (dtype or old[0], shape or old[1], data if data is not None else old[2])}


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def identities(checkpoint):
    return fingerprint(checkpoint), digest(checkpoint)


def test_layout_order_names_of_files_and_metadata_change_no_identity(write):
    expected = identities(write(TENSORS))
    backwards = dict(reversed(TENSORS.items()))
    alone = write(TENSORS, folder="alone").folder
    others = [
        write(backwards, folder="backwards"),
        write(TENSORS, folder="shards", shards=True),
        write(backwards, folder="backward shards", shards=True, metadata={"format": "pt"}),
        open_checkpoint(write_tensors(alone / "my.safetensors", backwards)),
    ]
    assert [identities(other) for other in others] == [expected] * 4


def test_a_stored_copy_of_a_tied_embedding_changes_no_identity(write):
    with_copy = {**TENSORS, "lm_head.weight": TENSORS[EMBEDDING]}
    stored = write(with_copy, folder="copy", tied=True)
    assert identities(stored) == identities(write(TENSORS, tied=True))
    assert "lm_head.weight" not in stored.own_tensors
    assert "lm_head.weight" in tensor_digests(stored)


def test_a_head_of_its_own_is_part_of_the_identity(write):
    with_head = {**TENSORS, "lm_head.weight": TENSORS[EMBEDDING]}
    plain = identities(write(TENSORS))
    untied = identities(write(with_head, folder="untied", tied=False))
    other = ("BF16", (5, 2), flipped(TENSORS[EMBEDDING][2], 19))
    trained = identities(write({**TENSORS, "lm_head.weight": other}, folder="trained", tied=True))
    for number in (0, 1):
        assert len({plain[number], untied[number], trained[number]}) == 3


@pytest.mark.parametrize(
    "tensors",
    [
        changed(EMBEDDING, shape=(2, 5)),
        changed(EMBEDDING, dtype="F16"),
        changed("model.norm.weight", data=b"abce"),
        changed(BIG_NAME, data=flipped(BIG, sample_window(BIG_NAME, len(BIG))[0])),
        changed(BIG_NAME, data=flipped(BIG, sample_window(BIG_NAME, len(BIG))[1] - 1)),
        {**{name: value for name, value in TENSORS.items() if name != EMBEDDING}, "embedding": TENSORS[EMBEDDING]},
        {name: value for name, value in TENSORS.items() if name != EMBEDDING},
        {**TENSORS, "empty": ("F32", (0,), b"")},
    ],
    ids=["shape", "dtype", "byte", "first byte of the sample", "last byte of the sample", "name", "fewer", "more"],
)
def test_another_model_has_other_identities(tensors, write):
    first, second = identities(write(TENSORS)), identities(write(tensors, folder="other"))
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_a_byte_outside_the_sample_changes_the_digest_alone(write):
    start, stop = sample_window(BIG_NAME, len(BIG))
    assert 0 < start < stop < len(BIG)
    for place in (start - 1, stop):
        first = identities(write(TENSORS))
        second = identities(write(changed(BIG_NAME, data=flipped(BIG, place)), folder=f"other{place}"))
        assert first[0] == second[0]
        assert first[1] != second[1]


def test_values_that_change_places_change_the_identities(write):
    pair = {"a": ("U8", (4,), b"1234"), "b": ("U8", (4,), b"5678")}
    swapped = {"a": pair["b"], "b": pair["a"]}
    assert set(identities(write(pair))).isdisjoint(identities(write(swapped, folder="swapped")))


@pytest.mark.parametrize("n_bytes", [0, 1, SAMPLE_BYTES, SAMPLE_BYTES + 1, SAMPLE_BYTES + 8, 10**12])
def test_the_window_lies_in_the_tensor_and_on_whole_values(n_bytes):
    for number in range(20):
        start, stop = sample_window(f"tensor.{number}", n_bytes)
        assert 0 <= start <= stop <= n_bytes
        assert start % 8 == 0
        assert stop - start == min(n_bytes, SAMPLE_BYTES)


def test_windows_of_different_tensors_lie_apart():
    assert len({sample_window(f"tensor.{number}", 10**12) for number in range(50)}) == 50


def test_the_identities_stand_for_ever(write):
    # Patches on users' disks hold fingerprints: a change of the rule needs another prefix.
    assert identities(write(TENSORS)) == (
        "s4k1:bf4897049098ee82302e3949ef3d38e8c7acd8c2",
        "blake3:3f7c8f67874da5afb2229846968f02eadd2d00e4bfe285bf510865c20aa000de",
    )


def test_the_fingerprint_reads_a_sample_of_each_tensor_and_no_more(write, monkeypatch):
    read = []
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, place: read.append(count) or whole(fd, count, place))
    fingerprint(write(TENSORS))
    assert sorted(read) == [4, 20, SAMPLE_BYTES]


def test_the_digest_is_the_same_whatever_the_size_of_a_read(write, monkeypatch):
    expected = digest(write(TENSORS))
    monkeypatch.setattr(identity, "READ_BYTES", 1000)
    assert digest(write(TENSORS, folder="again")) == expected


def test_a_digest_tells_of_its_progress_to_the_end(write):
    told = []
    digest(write(TENSORS), progress=lambda *told_now: told.append(told_now))
    size = sum(len(data) for _, _, data in TENSORS.values())
    assert told[-1] == ("digest", size, size, "bytes")
    assert [done for _, done, _, _ in told] == sorted(done for _, done, _, _ in told)


@pytest.fixture
def count_digests(monkeypatch):
    """How many tensors were read whole since."""
    read = []
    whole = identity.digest_tensor
    monkeypatch.setattr(identity, "digest_tensor", lambda info: read.append(info.name) or whole(info))
    return read


def test_a_second_digest_reads_no_tensor(write, count_digests):
    first = digest(write(TENSORS, shards=True))
    assert len(count_digests) == 3
    assert digest(write(TENSORS, shards=True, folder="elsewhere")) == first
    assert len(count_digests) == 6
    count_digests.clear()
    assert digest(open_checkpoint(write(TENSORS, folder="x").folder.with_name("elsewhere"))) == first
    assert count_digests == []


@pytest.mark.parametrize("what", ["time", "size"])
def test_a_file_that_changed_is_read_again(what, write, count_digests):
    opened = write(TENSORS)
    first = digest(opened)
    count_digests.clear()
    facts = opened.files[0].path.stat()
    if what == "time":
        path = write(changed("model.norm.weight", data=b"abce")).folder
        os.utime(opened.files[0], ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    else:
        path = write({**TENSORS, "x": ("U8", (1,), b"x")}).folder
        os.utime(opened.files[0], ns=(facts.st_atime_ns, facts.st_mtime_ns))
    opened = open_checkpoint(path)
    assert digest(opened) != first
    assert len(count_digests) == len(opened.infos)


def with_digests(value):
    """An entry of the cache, for the right file, with something else for its digests."""
    return lambda whole: json.dumps({**json.loads(whole), "digests": value}).encode()


DAMAGES = {
    **{repr(content): lambda _, content=content: content for content in (b"", b"{", b"[]", b"\xff", b'{"key": 1}')},
    "deep": lambda _: b"[" * 100_000,
    "other digit": lambda whole: whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:],
    **{f"digests {value!r}": with_digests(value) for value in ({}, 5, None, [], "x", {"model.norm.weight": 5})},
    "sealed, of another type": lambda whole: render_sealed({**json.loads(whole), "digests": [5]}).encode(),
    "sealed, of no texts": lambda whole: render_sealed(
        {**json.loads(whole), "digests": dict.fromkeys(json.loads(whole)["digests"], 5)}
    ).encode(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_written_anew(damage, write, cache, count_digests):
    opened = write(TENSORS)
    first = digest(opened)
    (entry,) = (cache / "digests").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert digest(opened) == first
    assert len(count_digests) == 6
    assert entry.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(write, cache):
    opened = write(TENSORS)
    cache.write_text("a file where the folder should be")
    assert digest(opened) == digest(opened)
