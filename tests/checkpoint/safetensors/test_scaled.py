"""Weights as codes and scales, read against the library that each scheme comes from; damaged ones are refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from portllm.checkpoint.model.identity import digest, fingerprint
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError
from portllm.tensors.tensors import load, load_rows
from portllm.tensors.windows import load_values
from tests.checkpoint.safetensors.schemes import SCHEMES, fp8_blocks, gptq, mxfp4_experts

pytest.importorskip("compressed_tensors")


def folder_of(tensors, quantization, folder):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization} if quantization else {}))
    return folder


def weight_of(folder):
    checkpoint = open_checkpoint(folder)
    (info,) = checkpoint.infos.values()
    return info


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_has_the_shape_and_the_values_that_its_library_gives_it(scheme, tmp_path):
    stored, config, expected = SCHEMES[scheme]()
    info = weight_of(folder_of(stored, config, tmp_path))
    assert info.shape == tuple(expected.shape)
    np.testing.assert_array_equal(load(info).float().numpy(), expected.to(load(info).dtype).float().numpy())
    assert info.name == "m.weight" or "expert" in scheme.lower() or "GPT-OSS" in scheme


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_range_of_a_weight_is_that_range_of_it(scheme, tmp_path):
    stored, config, expected = SCHEMES[scheme]()
    info = weight_of(folder_of(stored, config, tmp_path))
    whole = load_values(info, 0, info.n_params)
    draws = np.random.default_rng(0).integers(0, info.n_params, (12, 2))
    for start, stop in [*np.sort(draws, axis=1).tolist(), [7, 7], [info.n_params - 1, info.n_params]]:
        np.testing.assert_array_equal(load_values(info, start, stop), whole[start:stop])
    rows = expected.shape[0]
    assert torch.equal(load_rows(info, rows // 3, rows // 2), load(info)[rows // 3 : rows // 2])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_stored_byte_is_in_the_identity(scheme, tmp_path):
    stored, config, _ = SCHEMES[scheme]()
    before = open_checkpoint(folder_of(stored, config, tmp_path / "before"))
    assert before.n_bytes == sum(tensor.nbytes for tensor in stored.values())
    for name, tensor in stored.items():
        if name.endswith("weight_shape"):
            continue  # another shape is another weight, and seldom one that fits
        changed = tensor.clone()
        changed.reshape(-1).view(torch.uint8)[:] ^= 1
        after = open_checkpoint(folder_of({**stored, name: changed}, config, tmp_path / "after"))
        assert fingerprint(after) != fingerprint(before), name
        assert digest(after) != digest(before), name


def test_how_zero_points_are_counted_is_in_the_identity(tmp_path):
    stored, config, _ = gptq()
    first = open_checkpoint(folder_of(stored, config, tmp_path / "first"))
    second = open_checkpoint(folder_of(stored, {**config, "checkpoint_format": "gptq_v2"}, tmp_path / "second"))
    assert fingerprint(first) != fingerprint(second)


def test_fp8_without_scales_in_a_model_that_is_not_quantized_is_its_own_values(tmp_path):
    values = torch.randn(4, 6).to(torch.float8_e5m2)
    info = weight_of(folder_of({"m.weight": values}, None, tmp_path))
    assert torch.equal(load(info), values.bfloat16())


def test_scales_of_a_cache_are_no_weights(tmp_path):
    stored, config, _ = fp8_blocks()
    stored = {name.replace("m.", "attn.k_proj."): tensor for name, tensor in stored.items()}
    with_scale = {**stored, "attn.k_scale": torch.ones(1)}
    checkpoint = open_checkpoint(folder_of(with_scale, config, tmp_path))
    assert list(checkpoint.infos) == ["attn.k_proj.weight"]
    other = open_checkpoint(folder_of(stored, config, tmp_path / "other"))
    assert fingerprint(checkpoint) != fingerprint(other)


def without(part):
    def change(stored):
        del stored[part]

    return change


def put(part, tensor):
    def change(stored):
        stored[part] = tensor

    return change


BLOCKS = "e.gate_up_proj_blocks"
DAMAGE = {
    "no scales of blocks": (fp8_blocks, without("m.weight_scale_inv"), "lacks 'm.weight_scale_inv', which that needs"),
    "too few scales": (fp8_blocks, put("m.weight_scale_inv", torch.ones(1, 2)), "has shape (1, 2) for the weight"),
    "scales of integers": (
        fp8_blocks,
        put("m.weight_scale_inv", torch.ones(2, 3, dtype=torch.int32)),
        "holds scales as I32",
    ),
    "no scales of experts": (mxfp4_experts, without("e.gate_up_proj_scales"), "lacks 'e.gate_up_proj_scales'"),
    "scales of fewer experts": (
        mxfp4_experts,
        put("e.gate_up_proj_scales", torch.ones(2, 40, 2, dtype=torch.uint8)),
        "has shape (2, 40, 2) of U8, expected (3, 40, 2)",
    ),
    "no zero points": (gptq, without("m.qzeros"), "lacks 'm.qzeros'"),
    "zero points of fewer groups": (gptq, put("m.qzeros", torch.ones(3, 4, dtype=torch.int32)), "which does not fit"),
    "groups of fewer columns": (gptq, put("m.g_idx", torch.zeros(48, dtype=torch.int32)), "does not fit"),
    "no shape": (
        SCHEMES["packed int4"],
        without("m.weight_shape"),
        "lacks 'm.weight_shape'",
    ),
    "another shape": (SCHEMES["packed int4"], put("m.weight_shape", torch.tensor([24, 65])), "does not fit"),
    "a negative shape": (SCHEMES["packed int4"], put("m.weight_shape", torch.tensor([-24, -64])), "expected a shape"),
    "twice": (gptq, put("m.weight", torch.ones(2, 2)), "is there twice"),
}


@pytest.mark.parametrize(("make", "change", "named"), DAMAGE.values(), ids=DAMAGE)
def test_parts_that_do_not_fit_each_other_are_refused_by_name(make, change, named, tmp_path):
    stored, config, _ = make()
    change(stored)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder_of(stored, config, tmp_path))
    assert named in str(caught.value)


def test_a_column_in_a_group_that_is_not_there_is_refused_when_it_is_read(tmp_path):
    stored, config, _ = gptq()
    stored["m.g_idx"][5] = 4
    info = weight_of(folder_of(stored, config, tmp_path))
    with pytest.raises(CheckpointError, match="columns in group 4, and 4 groups"):
        load(info)


def test_block_sizes_are_not_guessed(tmp_path):
    stored, _, _ = fp8_blocks()
    with pytest.raises(CheckpointError, match=r"config\.json has quantization_config"):
        open_checkpoint(folder_of(stored, None, tmp_path) / "model.safetensors")
