"""The numbers that a forecast rests on are those of the whole weights, in float64."""

import math

import pytest
import torch
from safetensors.torch import load_file

from portllm.checking.check import check_weights
from portllm.checking.forecast_features import weight_features
from portllm.checkpoint.open import open_checkpoint
from portllm.patch.adapter_folder import load_patch


def features(adapter, base, evolved):
    report = check_weights(load_patch(adapter), base=open_checkpoint(base), evolved=open_checkpoint(evolved), full=True)
    return weight_features(report.update, report.patches[0])


def norm(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def test_drift_and_size_are_those_of_the_matrices(tiny):
    adapter, base, evolved = tiny("adapter", target_modules=["q_proj", "down_proj"]), tiny("base"), tiny("evolved")
    found = features(adapter, base, evolved)
    before, after = weights_of(base), weights_of(evolved)
    drift = {name: after[name].double() - before[name].double() for name in before}
    changed = [name for name in before if name.endswith(("q_proj.weight", "down_proj.weight"))]
    factors = load_file(adapter / "adapter_model.safetensors")
    (scale,) = {delta.scale for delta in load_patch(adapter).deltas.values()}
    lefts = [name for name in factors if "lora_A" in name]
    size = scale * norm(factors[n.replace("lora_A", "lora_B")].double() @ factors[n].double() for n in lefts)
    assert found["drift"] == pytest.approx(norm(drift[n] for n in changed) / norm(before[n] for n in changed), rel=1e-4)
    assert found["size"] == pytest.approx(size / norm(after[n] for n in changed), rel=1e-4)
    assert found["drift_of_size"] == pytest.approx(norm(drift[n] for n in changed) / size, rel=1e-4)
    in_layers = [
        [name for name in before if f".layers.{layer}." in name and "norm" not in name and before[name].ndim > 1]
        for layer in (0, 1)
    ]
    ratios = [norm(drift[n] for n in names) / norm(before[n] for n in names) for names in in_layers]
    assert found["drift_layer"] == pytest.approx(max(ratios), rel=1e-4)
    tokens = "model.embed_tokens.weight"
    assert found["drift_tokens"] == pytest.approx(norm([drift[tokens]]) / norm([before[tokens]]), rel=1e-4)
    flat = [torch.cat([side[n].double().flatten() for n in changed]) for side in (before, after)]
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=0).item()
    assert found["angle"] == pytest.approx(1 - cosine, rel=1e-3, abs=1e-6)


def test_overlap_is_one_by_chance_and_more_where_the_update_works_where_the_patch_does(tiny, tmp_path):
    from portllm.merging.merge import merge

    base, adapter = tiny("base"), tiny("adapter", target_modules=["down_proj"])
    merge(
        load_patch(tiny("adapter", target_modules=["down_proj"], seed=1)),
        into=open_checkpoint(base),
        out=tmp_path / "e",
    )
    inside = features(adapter, base, tmp_path / "e")
    apart = features(tiny("adapter", target_modules=["down_proj"], seed=9), base, tiny("evolved"))
    assert inside["overlap_input"] > 2 * apart["overlap_input"]
    assert inside["with_drift"] > 0.9 > apart["with_drift"]


def test_what_cannot_be_measured_is_left_out(tiny):
    same = features(tiny("adapter"), tiny("base"), tiny("base"))
    assert same["drift"] == 0.0
    assert "overlap_input" not in same
    assert "drift_of_size" not in same
    assert all(math.isfinite(value) for value in same.values())
    refused = features(tiny("adapter"), tiny("base"), tiny("base", inner=24))
    assert "drift" not in refused
