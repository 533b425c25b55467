import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.checkpoint.open import open_checkpoint
from portllm.errors import NonFiniteError, PlanRefusedError
from portllm.patch.adapter_folder import load_patch
from portllm.probing import port_residual as module
from portllm.probing.port_residual import port_residual
from tests.models import make_adapter, make_base, make_model

FLOAT32_NOISE = 1e-5
"""Products of float32 factors and weights, relative to their norms."""


def dense(folder, name, *, scale=1.5):
    factors = load_file(folder / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    return scale * b @ a


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    base = tiny("base")
    return tuple(make_adapter(base, tmp_path_factory.mktemp("adapter"), seed=seed) for seed in (1, 2))


@pytest.mark.parametrize("in_memory", [True, False])
def test_every_number_is_that_of_dense_float64_arithmetic(tiny, adapters, monkeypatch, in_memory):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 40)  # several blocks of rows, the last one shorter
    monkeypatch.setattr(module, "KEPT_ELEMENTS", 1 << 20 if in_memory else 0)
    evolved = tiny("evolved")
    weights = load_file(evolved / "model.safetensors")
    report = port_residual(open_checkpoint(evolved), *map(load_patch, adapters)).to_json()
    assert len(report["modules"]) == 14
    for name, found in report["modules"].items():
        old, new = (dense(folder, name) for folder in adapters)
        update = weights[f"{name}.weight"].double() + old
        expected = {"residual": new - old, "ported": old, "retrained": new, "update": update}
        for what, matrix in expected.items():
            assert found[what]["frobenius"] == pytest.approx(float(matrix.norm()), rel=FLOAT32_NOISE)
            assert found[what]["spectral"] == pytest.approx(float(torch.linalg.svdvals(matrix)[0]), rel=1e-3)
        assert found["residual"]["rank"] == torch.linalg.matrix_rank(new - old, rtol=1e-6)
        assert found["of_update"]["frobenius"] == pytest.approx(float((new - old).norm() / update.norm()), rel=1e-5)
        assert found["of_delta"]["frobenius"] == pytest.approx(float((new - old).norm() / new.norm()), rel=1e-5)
        assert found["cosine"] == pytest.approx(float((new * old).sum() / new.norm() / old.norm()), rel=1e-5)
    total, modules = report["total"], report["modules"].values()
    assert total["update"]["frobenius"] == pytest.approx(math.hypot(*(each["update"]["frobenius"] for each in modules)))
    assert total["residual"]["spectral"] == max(each["residual"]["spectral"] for each in modules)
    assert total["mean_of_delta"]["spectral"] == pytest.approx(
        sum(each["of_delta"]["spectral"] for each in modules) / 14
    )


def test_a_patch_against_itself_has_no_residual(tiny, adapters):
    patch = load_patch(adapters[0])
    total = port_residual(open_checkpoint(tiny("evolved")), patch, patch).to_json()["total"]
    assert total["residual"] == {"frobenius": 0.0, "spectral": 0.0}
    assert total["cosine"] == pytest.approx(1.0)


def test_weights_that_are_stored_transposed_are_taken_as_they_are(tmp_path):
    base = make_base(tmp_path / "base", kind="gpt2")
    how = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapters = [make_adapter(base, tmp_path / str(seed), seed=seed, **how) for seed in (1, 2)]
    report = port_residual(open_checkpoint(base), *map(load_patch, adapters)).to_json()
    weights = {name: tensor.double() for name, tensor in make_model(kind="gpt2").state_dict().items()}
    for name, found in report["modules"].items():
        update = weights[f"{name}.weight"] + dense(adapters[0], name).T
        assert found["update"]["frobenius"] == pytest.approx(float(update.norm()), rel=FLOAT32_NOISE)
        assert found["update"]["spectral"] == pytest.approx(float(torch.linalg.svdvals(update)[0]), rel=1e-3)


def test_patches_of_other_modules_and_more_than_lora_are_refused_with_every_reason(tiny, adapters, tmp_path):
    some = make_adapter(tiny("base"), tmp_path / "some", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(PlanRefusedError) as caught:
        port_residual(open_checkpoint(tiny("evolved")), load_patch(adapters[0]), load_patch(some))
    assert len(caught.value.refusals) == 13
    assert "plain LoRA" in str(caught.value)
    assert "Train both on the same modules" in str(caught.value)


def test_a_weight_that_is_not_finite_is_named(tiny, adapters, tmp_path):
    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = math.inf
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        port_residual(open_checkpoint(base), *map(load_patch, adapters))
