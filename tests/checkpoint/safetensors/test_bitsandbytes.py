"""4-bit folders that transformers writes, read against bitsandbytes; damaged ones are refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.checkpoint.model.identity import digest, fingerprint
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError
from portllm.tensors.tensors import load
from tests.quantized import quantize_model

functional = pytest.importorskip("bitsandbytes.functional")

NAME = "model.layers.0.mlp.down_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def double(tiny, tmp_path_factory):
    """A folder of NF4 weights, double quantized."""
    return quantize_model(tiny("base", dtype=torch.bfloat16), tmp_path_factory.mktemp("nf4"), double=True)


def test_every_weight_is_what_transformers_computes_with(double):
    stored = load_file(double / "model.safetensors")
    checkpoint = open_checkpoint(double)
    quantized = [name for name, info in checkpoint.infos.items() if info.encoding]
    assert len(quantized) == 14
    for name, info in checkpoint.infos.items():
        expected = stored[name]
        if name in quantized:
            parts = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
            state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
            expected = functional.dequantize_4bit(expected, state)
        assert torch.equal(load(info), expected), name
    assert checkpoint.quantization == "nf4-double"


def test_it_has_the_tensors_of_the_model_that_it_was_made_from(double, tiny):
    base = open_checkpoint(tiny("base", dtype=torch.bfloat16))
    quantized = open_checkpoint(double)
    assert {name: (info.dtype, info.shape) for name, info in base.infos.items()} == {
        name: (info.dtype, info.shape) for name, info in quantized.infos.items()
    }
    assert fingerprint(base) != fingerprint(quantized)


def changed(folder, out, changes):
    """The folder's weights with these tensors in place of others; None leaves one out."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({key: value for key, value in tensors.items() if value is not None}, out / "model.safetensors")
    return out


@pytest.mark.parametrize("part", [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
def test_every_part_is_in_the_identity(double, tmp_path, part):
    values = load_file(double / "model.safetensors")[NAME + part].clone()
    values.view(torch.uint8)[0] ^= 1
    other = open_checkpoint(changed(double, tmp_path, {NAME + part: values}))
    assert fingerprint(other) != fingerprint(open_checkpoint(double))
    assert digest(other) != digest(open_checkpoint(double))


def state(**facts):
    whole = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [12, 20], "nested_blocksize": 256,
        "nested_dtype": "float32", "nested_offset": 0.5,
    } | facts  # fmt: skip
    return torch.frombuffer(bytearray(json.dumps(whole).encode()), dtype=torch.uint8)


DAMAGE = {
    "no scales": ({f"{NAME}.absmax": None}, ".absmax', which that needs"),
    "no weight": ({NAME: None}, f"'{NAME}', which that needs"),
    "too few scales": ({f"{NAME}.absmax": torch.zeros(3, dtype=torch.uint8)}, "has 3 elements of U8, expected 4"),
    "scales of another dtype": ({f"{NAME}.absmax": torch.zeros(4)}, "expected 4 of U8"),
    "a short code": ({f"{NAME}.quant_map": torch.zeros(8)}, "expected 16 of F32"),
    "no JSON": ({STATE: torch.zeros(9, dtype=torch.uint8)}, "is not valid JSON"),
    "a JSON list": ({STATE: torch.frombuffer(bytearray(b"[1]"), dtype=torch.uint8)}, "is not a JSON object"),
    "a long text": ({STATE: torch.zeros(5000, dtype=torch.uint8)}, "expected at most 4096"),
    "another kind": ({STATE: state(quant_type="fp4")}, "has quant_type 'fp4'"),
    "a different shape": ({STATE: state(shape=[12, 21])}, "expected 126 of U8"),
    "a negative shape": ({STATE: state(shape=[-12, -20])}, "has shape"),
    "an endless shape": ({STATE: state(shape=[2**70])}, "has shape"),
    "no blocks": ({STATE: state(blocksize=0)}, "has blocksize '0'"),
    "blocks in words": ({STATE: state(blocksize="64")}, "has blocksize"),
    "an unknown dtype": ({STATE: state(dtype="int8")}, "has dtype 'int8'"),
    "an offset in words": ({STATE: state(nested_offset="0.5")}, "has no finite nested_offset"),
}


@pytest.mark.parametrize(("changes", "named"), DAMAGE.values(), ids=DAMAGE)
def test_parts_that_do_not_fit_each_other_are_refused_by_name(double, tmp_path, changes, named):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(changed(double, tmp_path, changes))
    assert named in str(caught.value)


def test_an_odd_number_of_elements_and_of_blocks_is_read_whole(tmp_path):
    weight = torch.linspace(-1, 1, 33 * 5).reshape(33, 5).half()
    packed, quantized = functional.quantize_4bit(weight, blocksize=64, quant_type="fp4")
    parts = {f"w.weight.{key}": value for key, value in quantized.as_dict(packed=True).items()}
    save_file({"w.weight": packed, **parts}, tmp_path / "m.safetensors")
    info = open_checkpoint(tmp_path / "m.safetensors").info("w.weight")
    np.testing.assert_array_equal(load(info).numpy(), functional.dequantize_4bit(packed, quantized).numpy())
