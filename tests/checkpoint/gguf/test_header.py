"""The header of a GGUF file: what the `gguf` package writes is read as it reads it; what is damaged is refused."""

import contextlib
import struct
import tracemalloc

import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portllm.checkpoint.gguf.header import ListPlace, read_gguf_header, read_gguf_list
from portllm.checkpoint.model.identity import fingerprint
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError
from tests.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


def test_what_the_gguf_package_reads_is_read(file):
    theirs, ours = GGUFReader(file), read_gguf_header(file)
    assert {tensor.name: tensor.data_offset for tensor in theirs.tensors} == {
        name: tensor.start for name, tensor in ours.tensors.items()
    }
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.fields[key]
            found = read_gguf_list(ours.file, value) if isinstance(value, ListPlace) else value
            assert found == field.contents(), key


def text(value):
    return struct.pack("<Q", len(value)) + value


def header(*, tensors=(), fields=(), n_tensors=None, n_fields=None, version=3, data=bytes(64)):
    """A file of these raw descriptions and entries."""
    counts = struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(fields) if n_fields is None else n_fields,
    )
    start = b"GGUF" + counts + b"".join(fields) + b"".join(tensors)
    return start + bytes(-len(start) % 32) + data


def tensor(name=b"w", shape=(8,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def field(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


HUGE = 2**62
HOSTILE = {
    "more tensors than bytes": header(n_tensors=HUGE),
    "more entries than bytes": header(n_fields=HUGE),
    "a million tensors": header(n_tensors=10**6),
    "a name longer than the file": header(tensors=[struct.pack("<Q", HUGE) + b"w"]),
    "a text longer than the file": header(fields=[field(b"k", 8, struct.pack("<Q", HUGE))]),
    "a list longer than the file": header(fields=[field(b"k", 9, struct.pack("<IQ", 4, HUGE))]),
    "a list of empty texts": header(fields=[field(b"k", 9, struct.pack("<IQ", 8, 2**40))]),
    "a list of lists": header(fields=[field(b"k", 9, struct.pack("<IQ", 9, 1))]),
    "a value of an unknown type": header(fields=[field(b"k", 99, b"")]),
    "a key that is not text": header(fields=[field(b"\xff\xfe", 4, bytes(4))]),
    "a key that moves the cursor": header(fields=[field(b"\x1b[2J", 4, bytes(4))]),
    "a name of two lines": header(tensors=[tensor(b"w\n")]),
    "an entry twice": header(fields=[field(b"k", 4, bytes(4))] * 2),
    "no axes": header(tensors=[tensor(shape=())]),
    "too many axes": header(tensors=[tensor(shape=(1,) * 9)]),
    "an axis of zero": header(tensors=[tensor(shape=(0, 8))]),
    "a negative axis": header(tensors=[tensor(shape=(2**64 - 8,))]),
    "axes whose product overflows": header(tensors=[tensor(shape=(2**40, 2**40))]),
    "an unknown storage type": header(tensors=[tensor(kind=77)]),
    "a row of half a block": header(tensors=[tensor(shape=(33,), kind=8)]),
    "a place outside the file": header(tensors=[tensor(offset=64)]),
    "a place beyond every file": header(tensors=[tensor(offset=2**64 - 32)]),
    "a place that is not aligned": header(tensors=[tensor(offset=4)]),
    "an end outside the file": header(tensors=[tensor(shape=(17,))]),
    "two tensors in one place": header(tensors=[tensor(b"v"), tensor(b"w")]),
    "a tensor twice": header(tensors=[tensor(), tensor(offset=32)]),
    "an alignment of zero": header(fields=[field(b"general.alignment", 4, bytes(4))]),
    "an odd alignment": header(fields=[field(b"general.alignment", 4, struct.pack("<I", 7))]),
    "an alignment in words": header(fields=[field(b"general.alignment", 8, text(b"x"))]),
    "the first version": header(version=1),
    "a later version": header(version=4),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_header_that_breaks_a_rule_is_refused_without_using_memory(tmp_path, data):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="is not a complete GGUF file") as caught:
        read_gguf_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_the_helpers_of_these_tests_write_what_is_read(tmp_path):
    path = tmp_path / "whole.gguf"
    path.write_bytes(header(tensors=[tensor(b"v"), tensor(offset=32)], fields=[field(b"k", 6, struct.pack("<f", 0.5))]))
    found = read_gguf_header(path)
    assert list(found.tensors) == ["v", "w"]
    assert found.fields == {"k": 0.5}


@settings(max_examples=75, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 15_000), data=st.binary(min_size=1, max_size=9))
def test_bytes_that_change_are_refused_or_read_and_never_a_crash(file, tmp_path, place, data):
    whole = bytearray(file.read_bytes())
    whole[place : place + len(data)] = data
    path = tmp_path / "changed.gguf"
    path.write_bytes(whole)
    with contextlib.suppress(CheckpointError):
        fingerprint(open_checkpoint(path))
