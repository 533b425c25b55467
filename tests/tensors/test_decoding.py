"""From stored bytes to numbers, against the `gguf` package and bitsandbytes."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from hypothesis import given
from hypothesis import strategies as st

from portllm.files.source import LocalFile
from portllm.tensors.bytes import read_bytes
from portllm.tensors.decoding import decoded, spans_of, stored_rows, unpack_nibbles
from portllm.tensors.encoding import GGML_TYPES, UNREADABLE, GGMLBlocks
from portllm.tensors.info import TensorInfo
from portllm.tensors.tensors import load, load_rows
from portllm.tensors.windows import load_values
from tests.quantized import BLOCKS, random_blocks
from tests.tiny_gguf import permute

ROWS, WIDTH, HEADS = 12, 512, 2
QUANTIZED = [kind for kind in BLOCKS if kind not in ("F32", "F16", "BF16")]


def test_the_table_of_storage_types_is_that_of_the_gguf_package():
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    assert {number: theirs[number] for number in GGML_TYPES} == dict(GGML_TYPES)


def test_every_type_that_is_not_refused_can_be_dequantized():
    for name, elements, n_bytes in GGML_TYPES.values():
        if name not in UNREADABLE:
            values = dequantize(np.zeros((1, n_bytes), np.uint8).view(_words(name)), GGMLQuantizationType[name])
            assert values.size == elements


def _words(name):
    return {"F32": np.float32, "F16": np.float16}.get(name, np.uint8)


def stored_tensor(path, kind, *, heads=0, offset=0.0):
    """A tensor of random blocks in a file, and its values by the `gguf` package."""
    stored = random_blocks(kind, ROWS, WIDTH)
    values = dequantize(stored, GGMLQuantizationType[kind])
    path.write_bytes(b"before" + (permute(stored, heads) if heads else stored).tobytes())
    encoding = GGMLBlocks(kind, *BLOCKS[kind], heads, offset)
    info = TensorInfo("w", "F32", (ROWS, WIDTH), LocalFile(path), 6, 6 + stored.size, encoding)
    return info, values - np.float32(offset)


@pytest.mark.parametrize("heads", [0, HEADS])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_any_part_of_a_quantized_tensor_is_that_of_the_whole(tmp_path, kind, heads):
    info, values = stored_tensor(tmp_path / "m.gguf", kind, heads=heads)
    flat = values.reshape(-1)
    assert load(info).numpy().tobytes() == values.tobytes()
    for start, stop in ((0, 1), (31, 33), (255, 258), (511, 1025), (700, ROWS * WIDTH), (5, 5)):
        assert load_values(info, start, stop).tobytes() == flat[start:stop].tobytes()
    for start, stop in ((0, 1), (2, 5), (5, 7), (11, 12)):
        assert load_rows(info, start, stop).numpy().tobytes() == values[start:stop].tobytes()


def test_what_llama_cpp_added_is_taken_off(tmp_path):
    info, values = stored_tensor(tmp_path / "m.gguf", "Q8_0", offset=1.0)
    assert load(info).numpy().tobytes() == values.tobytes()


def test_a_part_costs_the_blocks_that_it_needs(tmp_path):
    info, _ = stored_tensor(tmp_path / "m.gguf", "Q4_K")
    assert [stop - start for _, start, stop in spans_of(info, 300, 500)] == [144]
    reordered, _ = stored_tensor(tmp_path / "m.gguf", "Q4_K", heads=HEADS)
    assert [stop - start for _, start, stop in spans_of(reordered, 4 * WIDTH, 5 * WIDTH)] == [2 * 144]


@given(st.integers(1, 6), st.integers(1, 9))
def test_reordering_of_rows_is_a_permutation(heads, half):
    n_rows = 2 * heads * half
    rows = stored_rows(np.arange(n_rows), n_rows=n_rows, n_heads=heads)
    assert sorted(rows.tolist()) == list(range(n_rows))
    assert permute(np.arange(n_rows), heads)[rows].tolist() == list(range(n_rows))


@given(st.binary(max_size=20))
def test_half_bytes_are_taken_upper_half_first(data):
    assert bytes.fromhex("".join(f"{half:x}" for half in unpack_nibbles(np.frombuffer(data, np.uint8)))) == data


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bit_weights_are_what_bitsandbytes_makes_of_them(tmp_path, kind, double, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    from safetensors.torch import save_file

    from portllm.checkpoint.open import open_checkpoint

    torch.manual_seed(0)
    weight = (torch.randn(150, 301) / 50).to(dtype)  # 706 blocks: nested scales of three groups, the last one cut short
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=kind)
    parts = {f"w.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    save_file({"w.weight": packed, **parts}, tmp_path / "m.safetensors")
    info = open_checkpoint(tmp_path / "m.safetensors").info("w.weight")
    expected = functional.dequantize_4bit(packed, state)
    assert (info.shape, load(info).dtype) == ((150, 301), dtype)
    assert torch.equal(load(info), expected)
    assert torch.equal(load_rows(info, 55, 149), expected[55:149])
    flat = expected.float().reshape(-1).numpy()
    for start, stop in ((0, 1), (1, 2), (63, 66), (16_383, 40_001), (45_149, 45_150), (7, 7)):
        assert load_values(info, start, stop).tobytes() == flat[start:stop].tobytes()
        spans = spans_of(info, start, stop)
        assert sum(last - first for _, first, last in spans) <= (stop - start) // 2 + (stop - start) // 8 + 1200
        assert decoded(info, start, stop, [read_bytes(*span) for span in spans]).size == stop - start
