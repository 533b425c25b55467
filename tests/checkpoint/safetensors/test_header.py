"""The header: one hostile file for each rule of the format, and the safetensors library as oracle for the rest."""

import json
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from portllm.checkpoint.safetensors.header import MAX_HEADER_BYTES, parse_header, parse_header_length, render_header
from portllm.checkpoint.safetensors.header_file import read_header
from portllm.errors import HeaderError
from portllm.files.source import LocalFile
from portllm.tensors.info import DTYPE_BITS, n_bytes_of
from portllm.tensors.tensors import TORCH_DTYPES
from tests.safetensors_files import file_bytes

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
SAFETENSORS_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def one(**changes):
    """A file with one tensor 'w' of 24 bytes and changes to its entry."""
    return file_bytes({"w": {**GOOD, **changes}}, bytes(24))


def two(first, second, size):
    """A file with two tensors of bytes at the given offsets."""
    entries = {
        name: {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
        for name, (start, stop) in (("first", first), ("second", second))
    }
    return file_bytes(entries, bytes(size))


TEXT = json.dumps({"w": GOOD}).encode()

HOSTILE = {
    "empty file": (b"", "has 0 bytes"),
    "shorter than a length": (b"\x02\0\0", "has 3 bytes"),
    "length over the cap": (file_bytes(b"{}", length=MAX_HEADER_BYTES + 1), "the limit is 32000000"),
    "length of all ones": (file_bytes(b"{}", length=2**64 - 1), "the limit is 32000000"),
    "length over the file": (file_bytes(b"{}", length=3), "the file has 10"),
    "no JSON": (file_bytes(b""), "does not start with '{'"),
    "a list": (file_bytes(b"[1]"), "does not start with '{'"),
    "a space before": (file_bytes(b" {}"), "does not start with '{'"),
    "a byte order mark": (file_bytes(b"\xef\xbb\xbf{}"), "does not start with '{'"),
    "bad UTF-8": (file_bytes(b'{"\xff":1}'), "not valid JSON"),
    "half a surrogate pair": (file_bytes(TEXT.replace(b'"w"', b'"\\ud800"'), bytes(24)), "not valid JSON"),
    "cut JSON": (file_bytes(TEXT[:-1], bytes(24)), "not valid JSON"),
    "text after the JSON": (file_bytes(TEXT + b"x", bytes(24)), "not valid JSON"),
    "deep nesting": (file_bytes(b'{"w":' + b"[" * 200_000), "nested too deeply"),
    "NaN": (file_bytes(b'{"w": NaN}'), "NaN is not valid JSON"),
    "a number of many digits": (file_bytes(b'{"w": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "a name that": (file_bytes(TEXT[:-1] + b"," + TEXT[1:], bytes(24)), "'w'"),
    "a field that": (
        file_bytes(TEXT.replace(b'"dtype"', b'"dtype":"U8","dtype"'), bytes(24)),
        "'dtype'",
    ),
    "a name that moves the cursor": (
        file_bytes({"\x1b[2J": GOOD}, bytes(24)),
        r"'\\x1b\[2J': its name contains a control",
    ),
    "a name of two lines": (
        file_bytes({"w\n  ok": GOOD}, bytes(24)),
        r"tensor 'w\\n  ok': its name contains a control",
    ),
    "a name written the wrong way": (file_bytes({"\u202ew": GOOD}, bytes(24)), "its name contains a control"),
    "a name without end": (file_bytes({"w" * 1025: GOOD}, bytes(24)), "its name has 1025 characters"),
    "an entry that is a list": (file_bytes({"w": [1]}), "tensor 'w': must have exactly"),
    "an entry that lacks a field": (file_bytes({"w": {"dtype": "F32", "shape": [0]}}), "tensor 'w': must have exactly"),
    "an entry with a field more": (one(strides=[3, 1]), "tensor 'w': must have exactly"),
    "unknown dtype": (one(dtype="F33"), "tensor 'w': has the unknown dtype 'F33'"),
    "dtype of another type": (one(dtype=["F32"]), "tensor 'w': has the unknown dtype"),
    "shape of another type": (one(shape="2,3"), "tensor 'w': has the shape 2,3"),
    "negative size": (one(shape=[-2, -3]), "tensor 'w': has the shape"),
    "size that is not whole": (one(shape=[2.0, 3]), "tensor 'w': has the shape"),
    "true as a size": (one(shape=[True, 6]), "tensor 'w': has the shape"),
    "size over 64 bits": (one(shape=[2**64, 0], data_offsets=[0, 0]), "tensor 'w': has the shape"),
    "too many axes": (one(shape=[1] * 64 + [6]), "tensor 'w': has the shape"),
    "product over 64 bits": (one(shape=[2**32, 2**32]), f"its shape and dtype need {2**66}"),
    "product that wraps to the right size": (one(shape=[2**63, 2, 6]), "holds 24 bytes; its shape and dtype need"),
    "half a byte": (one(dtype="F4", shape=[3], data_offsets=[0, 2]), "tensor 'w': has 12 bits"),
    "offsets of another type": (one(data_offsets="0,24"), "tensor 'w': has the offsets"),
    "one offset": (one(data_offsets=[24]), "tensor 'w': has the offsets"),
    "three offsets": (one(data_offsets=[0, 24, 24]), "tensor 'w': has the offsets"),
    "true as an offset": (one(data_offsets=[0, True]), "tensor 'w': has the offsets"),
    "negative offset": (one(data_offsets=[-24, 0]), "tensor 'w': has the offsets"),
    "offsets the wrong way": (one(data_offsets=[24, 0]), "tensor 'w': holds -24 bytes"),
    "fewer bytes than the shape": (one(data_offsets=[0, 20]), "tensor 'w': holds 20 bytes"),
    "more bytes than the shape": (one(shape=[2, 2]), "tensor 'w': holds 24 bytes"),
    "overlap": (two((0, 8), (7, 16), 16), "tensor 'second': starts at byte .* and overlaps"),
    "same place twice": (two((0, 8), (0, 8), 8), "tensor 'second': starts at byte .* and overlaps"),
    "hole": (two((0, 8), (9, 16), 16), "tensor 'second': starts at byte .* and leaves a gap"),
    "hole at the start": (two((4, 8), (8, 16), 16), "tensor 'first': starts at byte .* and leaves a gap"),
    "tail": (two((0, 8), (8, 16), 17), "the tensors end at byte"),
    "tensor past the end": (two((0, 8), (8, 16), 15), "the tensors end at byte"),
    "data without a tensor": (file_bytes({}, b"x"), "the tensors end at byte"),
    "metadata that is a list": (file_bytes({"__metadata__": ["pt"]}), "must map strings to strings"),
    "metadata that is null": (file_bytes({"__metadata__": None}), "must map strings to strings"),
    "metadata with a number": (file_bytes({"__metadata__": {"n": 1}}), "must map strings to strings"),
}


@pytest.mark.parametrize("rule", HOSTILE)
def test_a_file_that_breaks_a_rule_is_refused(rule, tmp_path):
    content, message = HOSTILE[rule]
    file = tmp_path / "m.safetensors"
    file.write_bytes(content)
    with pytest.raises(HeaderError, match=message) as refused:
        read_header(file)
    assert str(file) in str(refused.value)
    assert "ownload" in str(refused.value) or "not a safetensors file" in str(refused.value)


OF_THE_LIBRARY = {
    "the header cut by its length": (file_bytes({"w": GOOD}, bytes(24), length=30), "not valid JSON"),
    "a length in another byte order": ((60).to_bytes(8, "big") + TEXT + bytes(24), "the limit is 32000000"),
    "ten tensors at one place": (
        file_bytes({f"w{index}": GOOD for index in range(10)}, bytes(24)),
        "tensor 'w1': starts at byte .* and overlaps",
    ),
    "a second file behind the first": (file_bytes({"w": GOOD}, bytes(24) + b"PK\x03\x04 a zip file"), "the file has"),
    "two bytes too few": (file_bytes({"w": GOOD}, bytes(22)), "the tensors end at byte"),
    "a length without a header": ((60).to_bytes(8, "little"), "the file has 8"),
    "one byte that is no UTF-8": (file_bytes(b"\xff"), "does not start with '{'"),
    "one brace": (file_bytes(b"{"), "not valid JSON"),
    "elements over 64 bits": (one(shape=[2, 2**64 - 2]), "its shape and dtype need"),
    "bytes over 64 bits": (one(shape=[2, 2**63 - 1]), "its shape and dtype need"),
    "four bytes for sixteen": (file_bytes({"w": {**GOOD, "data_offsets": [0, 4]}}, bytes(4)), "holds 4 bytes"),
    "a tensor of no bytes that takes some": (
        file_bytes({"w": {"dtype": "I32", "shape": [2, 0], "data_offsets": [0, 4]}}, bytes(4)),
        "holds 4 bytes; its shape and dtype need 0",
    ),
    "a scalar of no bytes": (
        file_bytes({"w": {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}}),
        "holds 0 bytes; its shape and dtype need 4",
    ),
    "six bits": (
        file_bytes({"w": {"dtype": "F6_E3M2", "shape": [1], "data_offsets": [0, 1]}}, b"x"),
        "has 6 bits",
    ),
    "half a byte beside a whole one": (
        file_bytes(
            {
                "four": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]},
                "w": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]},
            },
            bytes(2),
        ),
        "tensor 'four': has 12 bits",
    ),
    "zeros where spaces belong": (file_bytes(TEXT + bytes(5), bytes(24)), "not valid JSON"),
    "metadata inside metadata": (file_bytes({"__metadata__": {"a": {"b": "c"}}}), "must map strings to strings"),
    "metadata twice": (file_bytes(b'{"__metadata__":{},"__metadata__":{}}'), "'__metadata__'"),
    "a null for a tensor": (file_bytes({"w": None}), "must have exactly"),
    "offsets that are no whole numbers": (one(data_offsets=[0.0, 24.0]), "which are not two positions"),
    "an offset of 64 bits": (one(data_offsets=[2**64, 2**64 + 24]), "which are not two positions"),
    "an infinity for a size": (
        file_bytes(TEXT.replace(b"[2, 3]", b"[1e999]"), bytes(24)),
        "exceeds the supported range",
    ),
}
"""What the tests, attacks and fuzzing of the safetensors library are about, and its rules by which each is refused."""

HOSTILE |= OF_THE_LIBRARY

FORGIVEN = {
    "a name that moves the cursor",
    "a name of two lines",
    "a name that",
    "a name without end",
    "a name written the wrong way",
    "a space before",
    "an entry with a field more",
    "metadata that is null",
    "too many axes",
}
"""What the library lets pass and this program does not."""


@pytest.mark.parametrize("rule", sorted(set(HOSTILE) - FORGIVEN))
def test_the_library_refuses_the_hostile_files_too(rule, tmp_path):
    file = tmp_path / "m.safetensors"
    file.write_bytes(HOSTILE[rule][0])
    with pytest.raises((safetensors.SafetensorError, ValueError)), safetensors.safe_open(file, "pt"):
        pass


def test_the_cap_itself_is_allowed():
    length = MAX_HEADER_BYTES.to_bytes(8, "little")
    assert parse_header_length(length, file=LocalFile(Path("m")), file_bytes=8 + MAX_HEADER_BYTES) == MAX_HEADER_BYTES


def test_a_header_without_tensors_is_a_file():
    assert parse_header(b"{}", file=LocalFile(Path("m")), file_bytes=10).tensors == {}


def test_a_scalar_and_empty_tensors_have_their_place():
    text = json.dumps(
        {
            "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
            "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [4, 4]},
            "first": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]},
        }
    ).encode()
    tensors = parse_header(text, file=LocalFile(Path("m")), file_bytes=8 + len(text) + 4).tensors
    assert {name: info.n_params for name, info in tensors.items()} == {"scalar": 1, "empty": 0, "first": 0}
    assert tensors["empty"].start == tensors["scalar"].stop == 8 + len(text) + 4


def test_a_dtype_narrower_than_a_byte_counts_bits():
    assert n_bytes_of("F4", (3, 4)) == 6
    assert n_bytes_of("F6_E2M3", (4,)) == 3


names = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@given(
    tensors=st.dictionaries(names, st.tuples(st.sampled_from(SAFETENSORS_DTYPES), shapes), max_size=6),
    metadata=st.dictionaries(names, names, max_size=3),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_rendered_the_library_reads(tensors, metadata):
    order = sorted(tensors, key=lambda name: (-DTYPE_BITS[tensors[name][0]], name))
    head = render_header([(name, *tensors[name]) for name in order], metadata)
    size = sum(n_bytes_of(dtype, shape) for dtype, shape in tensors.values())
    data = bytes(index % 251 for index in range(size))

    entries = dict(safetensors.deserialize(head + data))
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()} == tensors
    parsed = parse_header(head[8:], file=LocalFile(Path("m")), file_bytes=len(head) + size)
    assert len(head) % 8 == 0
    assert parsed.metadata == metadata
    for name, entry in entries.items():
        info = parsed.tensors[name]
        assert bytes(entry["data"]) == (head + data)[info.start : info.stop]


@given(
    tensors=st.dictionaries(names, st.tuples(st.sampled_from(SAFETENSORS_DTYPES), shapes), max_size=6),
    metadata=st.dictionaries(names, names, max_size=3),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_the_library_writes_is_parsed(tensors, metadata):
    made = {
        name: torch.arange(torch.Size(shape).numel()).reshape(shape).to(TORCH_DTYPES[dtype])
        for name, (dtype, shape) in tensors.items()
    }
    content = save(made, metadata or None)

    length = parse_header_length(content[:8], file=LocalFile(Path("m")), file_bytes=len(content))
    parsed = parse_header(content[8 : 8 + length], file=LocalFile(Path("m")), file_bytes=len(content))
    assert {name: (info.dtype, info.shape) for name, info in parsed.tensors.items()} == tensors
    assert parsed.metadata == metadata
    for name, tensor in made.items():
        stored = content[parsed.tensors[name].start : parsed.tensors[name].stop]
        assert stored == bytes(tensor.reshape(-1).view(torch.uint8).tolist() if tensor.numel() else b"")


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480])
def test_a_length_that_begins_as_a_pickle_does_is_a_length(length):
    prefix = length.to_bytes(8, "little")
    assert parse_header_length(prefix, file=LocalFile(Path("m.safetensors")), file_bytes=8 + length) == length
