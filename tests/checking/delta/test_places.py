"""Where a patch sits, against dense float64 arithmetic on the same files."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.checking.check import MOST_TENSORS, check_weights
from portllm.checking.report import patch_to_json
from portllm.checkpoint.open import open_checkpoint
from portllm.measures.places import TensorPlace
from portllm.patch.adapter_folder import load_patch

SCALE = 6 / 4
"""Of the tiny adapter: alpha over rank."""


def placed(adapter, base, evolved, **how):
    models = {"base": open_checkpoint(base), "evolved": open_checkpoint(evolved)}
    return check_weights(load_patch(adapter), places=True, **models, **how).patches[0]


def dense_delta(adapter, module):
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].double().numpy() for x in "AB")
    return SCALE * b @ a


@pytest.mark.parametrize(("module", "kind"), [("self_attn.q_proj", (18, 12)), ("mlp.down_proj", (12, 20))])
def test_size_and_spectrum_are_those_of_the_dense_delta(tiny, module, kind):
    adapter, evolved = tiny("adapter"), tiny("evolved", drift=0.002)
    found = placed(adapter, tiny("base"), evolved, full=True).places[TensorPlace("model.layers", 1, module)]
    delta = dense_delta(adapter, f"model.layers.1.{module}")
    weight = load_file(evolved / "model.safetensors")[f"model.layers.1.{module}.weight"].double().norm().item()
    assert delta.shape == kind
    assert found.relative_size == pytest.approx(np.linalg.norm(delta) / weight, rel=1e-5)
    assert found.spectrum == pytest.approx(np.linalg.svd(delta, compute_uv=False)[:4] / weight, rel=1e-5)


def test_every_matrix_that_the_patch_changes_has_a_place_though_a_verdict_needs_only_some(tiny, monkeypatch):
    monkeypatch.setattr("portllm.checking.check.MOST_TENSORS", 3)
    assert MOST_TENSORS > 14
    found = placed(tiny("adapter"), tiny("base"), tiny("evolved"))
    assert (len(found.changes), len(found.places)) == (3, 14)


def test_the_verdict_does_not_depend_on_it(tiny):
    base, evolved = open_checkpoint(tiny("base")), open_checkpoint(tiny("evolved"))
    reports = (
        check_weights(load_patch(tiny("adapter")), base=base, evolved=evolved, places=asked) for asked in (False, True)
    )
    without, with_places = (patch_to_json(report.patches[0]) for report in reports)
    assert without.pop("layers") is None
    assert len(with_places.pop("layers")) == 14
    assert without == with_places


def test_what_is_no_low_rank_delta_has_a_size_and_no_spectrum(tiny):
    base = tiny("base", tied=False)
    adapter = tiny("adapter", of=base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    found = placed(adapter, base, tiny("evolved", of=base))
    head = found.places[TensorPlace("", -1, "lm_head")]
    assert head.spectrum == ()
    assert math.isfinite(head.relative_size)


def test_a_factor_that_holds_no_number_is_the_verdict_and_null_in_json(tiny, tmp_path):
    folder = shutil.copytree(tiny("adapter"), tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.0.mlp.up_proj.lora_A" in name)
    save_file({**tensors, name: torch.full_like(tensors[name], math.nan)}, folder / "adapter_model.safetensors")
    found = patch_to_json(placed(folder, tiny("base"), tiny("evolved")))
    assert found["verdict"] == "will not hold"
    assert found["reasons"][0]["text"].startswith("model.layers.0.mlp.up_proj.weight: contains an infinity or NaN")
    cell = next(cell for cell in found["layers"] if (cell["layer"], cell["kind"]) == (0, "mlp.up_proj"))
    assert cell["relative_size"] is None
    assert set(cell["spectrum"]) == {None}
