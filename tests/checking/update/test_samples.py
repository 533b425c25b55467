"""Windows: where they lie, what they cost, and that the estimate is that of the whole."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.checking.update import samples as drift_samples
from portllm.checking.update.drift import measure_drift
from portllm.checking.update.samples import sample_drift, windows_of
from portllm.checkpoint.open import open_checkpoint
from portllm.matching.tensor_pairs import pair_tensors
from portllm.measures.estimate import estimate_drift
from tests.safetensors_files import write_sparse

MATRIX = "model.layers.0.mlp.up_proj.weight"


def pairs_of(base, evolved):
    return list(pair_tensors(open_checkpoint(base), open_checkpoint(evolved)).pairs.values())


@pytest.fixture
def sparse(tmp_path):
    """A model of zeros that takes no room, twice."""

    def write(tensors):
        file = write_sparse(tmp_path / "model.safetensors", tensors)
        return pairs_of(file, file)

    return write


@pytest.fixture(scope="module")
def pair_of_models(tmp_path_factory):
    """Two models of one matrix and a vector, of a few windows each; rows drift by different amounts."""
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    weight, vector = torch.randn(3000, 300, generator=generator), torch.ones(300)
    rows = 0.01 + 0.04 * torch.rand(3000, 1, generator=generator)
    moved = weight + rows * torch.randn(3000, 300, generator=generator)
    save_file({MATRIX: weight, "model.norm.weight": vector}, folder / "base.safetensors")
    save_file({MATRIX: moved, "model.norm.weight": vector + 0.5}, folder / "evolved.safetensors")
    return folder / "base.safetensors", folder / "evolved.safetensors"


def test_a_tiny_model_is_read_whole_and_the_estimate_is_exact(tiny):
    base, evolved = tiny("base"), tiny("evolved")
    sample = sample_drift(pairs_of(base, evolved))
    drift = estimate_drift(stratum for strata in sample.strata.values() for stratum in strata)
    exact = measure_drift(open_checkpoint(base), open_checkpoint(evolved)).total
    assert drift.relative.value == pytest.approx(exact.relative, rel=1e-5)
    assert drift.relative.error == drift.cosine.error == 0.0
    assert sample.n_elements == open_checkpoint(base).n_params


def test_the_estimate_of_windows_is_within_its_error_of_the_whole(pair_of_models):
    sample = sample_drift(pairs_of(*pair_of_models))
    drift = estimate_drift(stratum for strata in sample.strata.values() for stratum in strata)
    exact = measure_drift(*map(open_checkpoint, pair_of_models)).total
    assert 0 < drift.relative.error < 0.4 * exact.relative
    assert drift.relative.low <= exact.relative <= drift.relative.high
    assert drift.cosine.low <= exact.cosine <= drift.cosine.high


def test_rows_are_those_of_the_weight(pair_of_models):
    sampled = sample_drift(pairs_of(*pair_of_models)).rows[MATRIX]
    for file, found in zip(pair_of_models, (sampled.base, sampled.evolved), strict=True):
        np.testing.assert_array_equal(found, load_file(file)[MATRIX].numpy()[sampled.rows])
    assert len(set(sampled.rows.tolist())) == len(sampled.rows)


def test_windows_lie_spread_over_the_weight_and_do_not_overlap(sparse):
    (pair,) = sparse({MATRIX: ("BF16", (10_000, 700))})
    windows = windows_of(pair, 5)
    assert [start * 5 // 10_000 for start, _ in windows] == [0, 1, 2, 3, 4]
    assert all(stop - start == 3 for start, stop in windows)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(windows))


@pytest.mark.parametrize("layers", [4, 30])
def test_more_layers_cost_no_more_than_the_budget(layers, sparse, monkeypatch):
    monkeypatch.setattr(drift_samples, "BUDGET_ELEMENTS", 1 << 18)
    names = [f"model.layers.{layer}.mlp.{kind}_proj.weight" for layer in range(layers) for kind in ("up", "gate")]
    sample = sample_drift(sparse(dict.fromkeys(names, ("BF16", (500, 2048)))))
    assert len(sample.rows) == 2 * layers
    assert sample.n_elements <= 1 << 18


def test_of_very_many_experts_some_of_each_layer_are_read_and_stand_for_the_rest(sparse, monkeypatch):
    monkeypatch.setattr(drift_samples, "BUDGET_ELEMENTS", 1 << 17)
    tensors = {f"model.layers.{layer}.self_attn.q_proj.weight": ("BF16", (50, 2048)) for layer in range(2)}
    tensors |= {
        f"model.layers.{layer}.mlp.experts.{number}.up_proj.weight": ("BF16", (50, 2048))
        for layer in range(2)
        for number in range(40)
    }
    sample = sample_drift(sparse(tensors))
    assert sample.n_elements <= 1 << 17
    assert sum("q_proj" in name for name in sample.rows) == 2
    for place, strata in sample.strata.items():
        if place.is_expert:
            (stratum,) = strata
            assert len(stratum.units) >= 2
            assert stratum.scale == 40 * 50 * 2048 / (len(stratum.units) * 2 * 2048)


def test_where_windows_lie_depends_on_the_names_alone(tiny):
    from tests.models import SEVERAL_SHARDS

    one = sample_drift(pairs_of(tiny("base"), tiny("evolved")))
    other = sample_drift(pairs_of(tiny("base", max_shard_size=SEVERAL_SHARDS), tiny("evolved")))
    assert one.strata == other.strata
