"""Whether merges of any tool hold a patch: PEFT's do, to rounding; what is wrong with others is named."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import portllm
from portllm.errors import PlanRefusedError
from portllm.verifying.likeness import Extent, Likeness
from tests import models
from tests.tiny_gguf import convert_llama


@pytest.fixture(scope="module")
def merges(tiny, tmp_path_factory):
    """A patch of a bfloat16 model, and merges of it."""
    folder = tmp_path_factory.mktemp("merges")
    base = tiny("base")
    patch = portllm.capture(tiny("adapter", of=base, size=0.1), base=base, out=folder / "patch")
    portllm.merge(patch, into=base, out=folder / "ours")
    models.merge_with_peft(base, folder / "patch", folder / "theirs")
    return folder


def held(merged, patch, base):
    return portllm.verify(merged, patch=patch, base=base)


def changed(merged, out, change, *, only=lambda name: True):
    """A copy of a merge with some of its tensors changed."""
    shutil.copytree(merged, out, ignore=shutil.ignore_patterns("portllm.json"))
    tensors = load_file(out / "model.safetensors")
    save_file(
        {name: change(name, tensor) if only(name) else tensor for name, tensor in tensors.items()},
        out / "model.safetensors",
        {"format": "pt"},
    )
    return out


def test_a_merge_of_ours_holds_its_patch_exactly(merges, tiny):
    found = held(merges / "ours", merges / "patch", tiny("base"))
    assert (found.verified, found.holding.extent) == (True, Extent.EXACTLY)
    assert found.checks[-1].subject == "patch"
    assert len(found.checks) > 1  # and it is as it was written


def test_a_merge_of_peft_holds_it_exactly_where_the_factors_are_float32(merges, tiny):
    assert held(merges / "theirs", merges / "patch", tiny("base")).holding.extent is Extent.EXACTLY


@pytest.mark.parametrize("size", [0.003, 0.03, 0.3])
def test_a_merge_in_which_the_factors_were_cast_holds_it_to_rounding(tiny, tmp_path, size):
    base = tiny("base", hidden=48, inner=80)
    adapter = tiny("adapter", of=base, size=size)
    tensors = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    for name in weights:
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        if key.format("A") in tensors:
            a, b = (tensors[key.format(factor)].bfloat16() for factor in "AB")
            weights[name] = weights[name] + (b @ a) * torch.tensor(1.5).bfloat16()
    shutil.copytree(base, tmp_path / "theirs")
    save_file(weights, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    assert held(tmp_path / "theirs", adapter, base).holding.extent is Extent.TO_ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_merge_stored_in_another_dtype_holds_it_to_rounding(merges, tiny, tmp_path, dtype):
    stored = changed(merges / "theirs", tmp_path / "stored", lambda _, tensor: tensor.to(dtype))
    assert held(stored, merges / "patch", tiny("base")).holding.extent is Extent.TO_ROUNDING


def test_a_base_without_the_patch_holds_nothing_of_it(merges, tiny):
    found = held(tiny("base"), merges / "patch", tiny("base"))
    assert (found.verified, found.holding.extent) == (False, Extent.NOT)
    assert {one.finding for one in found.holding.wrong.values()} == {"as in the base: the patch is not in it"}


def test_a_dropped_layer_is_named(merges, tiny, tmp_path):
    base = load_file(tiny("base") / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    dropped = changed(merges / "theirs", tmp_path / "dropped", lambda name, _: base[name], only=lambda n: n == name)
    found = held(dropped, merges / "patch", tiny("base"))
    assert (found.holding.extent, list(found.holding.wrong)) == (Extent.PARTLY, [name])
    assert f"wrong: {name} as in the base" in found.checks[0].finding


@pytest.mark.parametrize("factor", [0.5, 1.1, 2.0])
def test_a_wrong_scale_is_named_with_its_size(merges, tiny, tmp_path, factor):
    config = json.loads((merges / "patch" / "adapter_config.json").read_text())
    other = shutil.copytree(merges / "patch", tmp_path / "other", ignore=shutil.ignore_patterns("patch.json"))
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": factor * config["lora_alpha"]}))
    wrong = models.merge_with_peft(tiny("base"), other, tmp_path / "wrong")
    found = held(wrong, merges / "patch", tiny("base"))
    assert found.holding.extent is Extent.NOT
    for one in found.holding.wrong.values():
        assert float(one.finding.split()[1]) == pytest.approx(factor, rel=0.05), one.finding


def test_another_patch_is_not_this_one(merges, tiny, tmp_path):
    other = models.merge_with_peft(tiny("base"), tiny("adapter", seed=9), tmp_path / "other")
    found = held(other, merges / "patch", tiny("base"))
    assert found.holding.extent is Extent.NOT
    assert len(found.holding.wrong) == len(models.SEVEN) * models.LAYERS


def test_a_tensor_that_the_patch_leaves_alone_must_be_the_bases(merges, tiny, tmp_path):
    moved = changed(merges / "theirs", tmp_path / "moved", lambda _, t: t * 2, only=lambda name: "norm" in name)
    found = held(moved, merges / "patch", tiny("base"))
    assert found.holding.extent is Extent.PARTLY
    assert all("norm" in name for name in found.holding.wrong)


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"modules_to_save": ["norm"]}, {"trainable_token_indices": [3, 5]}]
)
def test_everything_else_of_a_patch_is_found_too(tiny, tmp_path, lora):
    base = tiny("base", tied=False)
    adapter = tiny("adapter", of=base, **lora)
    merged = models.merge_with_peft(base, adapter, tmp_path / "merged")
    assert held(merged, adapter, base).verified
    assert not held(base, adapter, base).verified


def test_a_model_with_other_tensors_cannot_be_compared(merges, tiny):
    with pytest.raises(PlanRefusedError, match="cannot be compared"):
        held(tiny("base", layers=1), merges / "patch", tiny("base"))


def test_the_command_exits_with_three_and_names_the_tensors(portllm, merges, tiny):
    base = tiny("base")
    assert portllm("verify", merges / "theirs", "--patch", merges / "patch", "--base", base).status == 0
    refused = portllm("verify", base, "--patch", merges / "patch", "--base", base, "--json")
    assert refused.status == 3
    assert json.loads(refused.out)["holding"]["extent"] == "not"
    assert portllm("verify", base, "--patch", merges / "patch").status == 2
    assert portllm("verify", base, "--patch", merges / "patch", "--base", tiny("evolved")).status == 1


def test_a_change_far_below_the_last_bit_is_told_from_none():
    draw = np.random.default_rng(0)
    base = draw.normal(size=100_000).astype(np.float32)
    from portllm.tensors.rounding import round_to

    base = round_to(base, "BF16")
    delta = (1e-4 * draw.normal(size=base.size)).astype(np.float32)
    for merged, extent in ((base + round_to(delta, "BF16"), Extent.TO_ROUNDING), (base, Extent.NOT)):
        likeness = Likeness("BF16", "BF16")
        likeness.add(round_to(merged, "BF16"), round_to(base + delta, "BF16"), base)
        assert likeness.extent in (extent, Extent.EXACTLY if extent is Extent.TO_ROUNDING else extent)


@pytest.fixture(scope="module")
def wide(tiny, tmp_path_factory):
    """A model whose rows fill whole blocks, a patch of it, and the merge."""
    folder = tmp_path_factory.mktemp("wide")
    base = tiny("base", hidden=96, inner=64)
    patch = portllm.capture(tiny("adapter", of=base, size=0.1), base=base, out=folder / "patch")
    portllm.merge(patch, into=base, out=folder / "merged")
    return {"base": base, "patch": folder / "patch", "merged": folder / "merged"}


@pytest.mark.parametrize(
    ("storage", "extent"), [("BF16", Extent.EXACTLY), ("Q8_0", Extent.TO_ROUNDING), ("Q4_0", Extent.TO_ROUNDING)]
)
def test_the_gguf_file_of_a_merge_holds_its_patch_as_far_as_its_type_goes(wide, tmp_path, storage, extent):
    file = convert_llama(wide["merged"], tmp_path / "merged.gguf", storage=storage)
    found = held(file, wide["patch"], wide["base"])
    assert (found.verified, found.holding.extent) == (True, extent)


@pytest.mark.parametrize(
    ("scale", "extent", "finding"),
    [(0.0, Extent.NOT, "as in the base, but for rounding"), (0.5, Extent.NOT, r"holds 0\.\d+ times the patch$")],
)
def test_what_a_quantized_file_has_in_place_of_the_patch_is_said(wide, tmp_path, scale, extent, finding):
    tensors, base = (load_file(wide[kind] / "model.safetensors") for kind in ("merged", "base"))
    moved = {name: base[name] + scale * (tensors[name].float() - base[name]) for name in tensors}
    shutil.copytree(wide["merged"], tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    save_file({name: tensor.to(tensors[name].dtype) for name, tensor in moved.items()}, file, {"format": "pt"})
    file = convert_llama(tmp_path / "other", tmp_path / "other.gguf", storage="Q8_0")

    found = held(file, wide["patch"], wide["base"]).holding

    assert found.extent is extent
    said = [held.finding for name, held in found.wrong.items() if "up_proj" in name]
    assert said
    assert all(re.search(finding, one) for one in said), said


def test_of_a_patch_that_quantization_hides_nothing_is_said(tiny, wide, tmp_path):
    patch = tiny("adapter", of=wide["base"], size=0.01)
    portllm.merge(patch, into=wide["base"], out=tmp_path / "merged")
    file = convert_llama(tmp_path / "merged", tmp_path / "merged.gguf", storage="Q4_0")
    with pytest.raises(PlanRefusedError, match=r"up_proj.*Q4_0 is so coarse"):
        held(file, patch, wide["base"])
