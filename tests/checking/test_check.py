"""Verdicts on models whose history is known, measures against float64, and that patches share the reading."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.checking import check as check_module
from portllm.checking.check import check_weights
from portllm.checking.delta import measures as patch_measures
from portllm.checking.report import patch_to_json
from portllm.checking.update import measures as measured_update
from portllm.checking.update.lineage import Lineage
from portllm.checking.update.report import update_to_json
from portllm.checking.verdict import Answer
from portllm.checkpoint.open import open_checkpoint
from portllm.patch.adapter_folder import load_patch
from portllm.patch.folders import find_patches, open_each

SHORT = 0.00003
"""Of `make_evolved`: an update within what is known to hold."""

FLOAT32 = 1e-5


def checked(adapter, base, evolved, **how):
    return check_weights(load_patch(adapter), base=open_checkpoint(base), evolved=open_checkpoint(evolved), **how)


def answer(report):
    return report.patches[0].verdict.answer


@pytest.fixture
def changed(tiny, tmp_path):
    """Writes the tiny base with other tensors or another configuration."""

    def write(change=None, *, config=None, name="changed"):
        folder = shutil.copytree(tiny("base"), tmp_path / name)
        if change is not None:
            save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        if config:
            fields = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**fields, **config}))
        return folder

    return write


@pytest.mark.parametrize("full", [False, True])
def test_a_short_continuation_holds(tiny, full):
    report = checked(tiny("adapter"), tiny("base"), tiny("evolved", drift=SHORT), full=full)
    assert report.update.lineage is Lineage.CONTINUATION
    assert answer(report) is Answer.HOLDS
    assert report.holds


def test_the_same_model_holds(tiny):
    report = checked(tiny("adapter"), tiny("base"), tiny("base"))
    assert report.update.lineage is Lineage.SAME
    assert answer(report) is Answer.HOLDS


def test_a_longer_way_is_uncertain(tiny):
    report = checked(tiny("adapter"), tiny("base"), tiny("evolved", drift=0.02))
    assert report.update.lineage is Lineage.CONTINUATION
    assert answer(report) is Answer.UNCERTAIN


@pytest.mark.parametrize("full", [False, True])
def test_weights_from_another_start_will_not_hold_though_every_shape_fits(tiny, full):
    report = checked(tiny("adapter"), tiny("base"), tiny("base", seed=7), full=full)
    assert report.update.lineage is Lineage.INDEPENDENT
    assert report.update.drift.relative.value == pytest.approx(math.sqrt(2), rel=0.1)
    assert answer(report) is Answer.WILL_NOT_HOLD


def test_a_twin_whose_inner_units_stand_in_another_order_will_not_hold(tiny, changed):
    def permute(tensors):
        order = torch.roll(torch.arange(20), 3)
        for layer in (0, 1):
            mlp = f"model.layers.{layer}.mlp."
            for name in ("gate_proj", "up_proj"):
                tensors[f"{mlp}{name}.weight"] = tensors[f"{mlp}{name}.weight"][order].contiguous()
            tensors[f"{mlp}down_proj.weight"] = tensors[f"{mlp}down_proj.weight"][:, order].contiguous()
        return tensors

    twin = changed(permute)
    report = checked(tiny("adapter"), tiny("base"), twin)
    assert report.update.kinds["mlp.up_proj"].lineage is Lineage.INDEPENDENT
    assert report.update.kinds["self_attn.q_proj"].lineage is Lineage.SAME
    assert answer(report) is Answer.WILL_NOT_HOLD
    attention = checked(tiny("adapter", target_modules=["q_proj"]), tiny("base"), twin)
    assert answer(attention) is Answer.HOLDS


@pytest.mark.parametrize("full", [False, True])
def test_an_update_that_is_the_patch_itself_is_seen(tiny, tmp_path, full):
    from tests.models import merge_with_peft

    base = tiny("base", dtype=torch.float32)
    adapter = tiny("adapter", of=base, size=0.05, target_modules=["up_proj"])
    evolved = merge_with_peft(base, adapter, tmp_path / "evolved")
    (patch,) = checked(adapter, base, evolved, full=full).patches
    assert patch.alignment.cosine == pytest.approx(1.0, abs=1e-4)
    assert patch.overlaps["input"].share == pytest.approx(1.0, abs=1e-4)
    assert ("output" in patch.overlaps) is full
    if full:
        assert patch.overlaps["output"].share == pytest.approx(1.0, abs=1e-4)
    assert patch.verdict.answer is Answer.UNCERTAIN
    assert any("contains the patch" in reason.text for reason in patch.verdict.reasons)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_shares_are_those_of_the_whole_drift(kind, tmp_path):
    from tests import models

    base = models.make_base(tmp_path / "base", kind=kind, dtype=torch.float32)
    evolved = models.make_evolved(base, tmp_path / "evolved")
    modules = ["c_fc"] if kind == "gpt2" else ["up_proj"]
    fields = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    adapter = models.make_adapter(base, tmp_path / "adapter", target_modules=modules, **fields)
    patch = load_patch(adapter)
    (found,) = checked(adapter, base, evolved, full=True).patches
    w0, w1, tensors = (
        load_file(file)
        for file in (base / "model.safetensors", evolved / "model.safetensors", adapter / "adapter_model.safetensors")
    )
    inside, total, size = 0.0, 0.0, 0.0
    for module in patch.deltas:
        name = next(n for n in w0 if n.endswith(f"{module.removeprefix('transformer.')}.weight"))
        drift = (w1[name] - w0[name]).double()
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        basis = torch.linalg.qr(a.T).Q
        inside += ((drift.T if kind == "gpt2" else drift) @ basis).square().sum().item()
        total += drift.square().sum().item()
        size += (patch.deltas[module].scale * (b @ a)).square().sum().item()
    # The tiny models are read whole; only the columns of the other side are a sample.
    assert found.overlaps["input"].share == pytest.approx(inside / total, rel=0.5 if kind == "gpt2" else FLOAT32)
    assert found.delta_sq == pytest.approx(size, rel=FLOAT32)
    assert found.overlaps["input"].by_chance == pytest.approx(4 / 12)


def test_size_and_drift_are_those_of_the_weights_that_the_patch_changes(tiny):
    base, evolved = tiny("base"), tiny("evolved", drift=SHORT)
    adapter = tiny("adapter", target_modules=["q_proj"])
    (patch,) = checked(adapter, base, evolved).patches
    w0, w1 = (load_file(folder / "model.safetensors") for folder in (base, evolved))
    names = [name for name in w0 if "q_proj" in name]
    drift, norm, evolved_norm = (
        math.sqrt(sum(part.double().square().sum().item() for part in parts))
        for parts in ([w1[n].double() - w0[n].double() for n in names], [w0[n] for n in names], [w1[n] for n in names])
    )
    assert patch.drift.relative.value == pytest.approx(drift / norm, rel=FLOAT32)
    assert patch.relative_size == pytest.approx(math.sqrt(patch.delta_sq) / evolved_norm, rel=FLOAT32)
    assert patch.size_against_drift == pytest.approx(math.sqrt(patch.delta_sq) / drift, rel=FLOAT32)


def test_kept_gain_is_that_of_a_merge(tiny, tmp_path):
    from portllm.merging.merge import merge

    adapter, evolved = tiny("adapter", size=0.02), tiny("evolved", drift=SHORT)
    (patch,) = checked(adapter, tiny("base"), evolved).patches
    report = merge(load_patch(adapter), into=open_checkpoint(evolved), out=tmp_path / "merged")
    assert patch.stored_as == "BF16"
    assert patch.rounding["BF16"].kept_gain == pytest.approx(report.total.kept_gain, rel=1e-4)
    assert patch.rounding["F32"].kept_gain == pytest.approx(1.0, rel=1e-4)


def test_what_does_not_fit_cannot_be_ported_and_says_what_port_says(tiny):
    from portllm.matching.port_plan import plan_port
    from portllm.matching.update import Update

    adapter, base, other = tiny("adapter"), tiny("base"), tiny("base", inner=24)
    report = checked(adapter, base, other)
    assert answer(report) is Answer.CANNOT_BE_PORTED
    refusals = plan_port(load_patch(adapter), Update(open_checkpoint(base), open_checkpoint(other))).refusals
    assert {reason.text for reason in report.patches[0].verdict.reasons} == {str(refusal) for refusal in refusals}
    assert "model.layers.0.mlp.up_proj.weight" in report.update.pairing.reshaped


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all", "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7]}},
        {"target_modules": ["q_proj"], "lora_bias": True},
        {"target_modules": ["lm_head"]},
    ],
    ids=lambda lora: "-".join(lora),
)
@pytest.mark.filterwarnings("ignore")  # peft warns of shapes that it wrote itself, and of tied embeddings
def test_every_part_of_a_patch_is_measured(lora, tmp_path):
    from tests import models

    base = models.make_base(tmp_path / "base", tied=False, attention_bias=True)
    evolved = models.make_evolved(base, tmp_path / "evolved", drift=SHORT)
    adapter = models.make_adapter(base, tmp_path / "adapter", **lora)
    patch = load_patch(adapter)
    (found,) = checked(adapter, base, evolved).patches
    assert found.verdict.answer is not Answer.CANNOT_BE_PORTED
    n_changes = sum(map(len, (patch.deltas, patch.values, patch.rows, patch.bias_deltas)))
    assert len(found.changes) == min(n_changes, check_module.MOST_TENSORS)
    assert all(measures.delta_sq > 0 for measures in found.changes.values())
    assert found.delta_sq > 0


@pytest.mark.parametrize("layouts", [(False, False), (True, True), (False, True), (True, False)])
@pytest.mark.filterwarnings("ignore")
def test_experts_are_measured_in_every_layout_alike(layouts, tmp_path):
    from tests import families

    how = {"dtype": torch.float32, "tied": False}
    base, evolved = (
        families.make_base("qwen3-moe", tmp_path / str(number), current=current, seed=0, **how)
        for number, current in enumerate(layouts)
    )
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = families.make_adapter(
        "qwen3-moe", base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=parameters
    )
    merged = families.merge_with_peft("qwen3-moe", evolved, adapter, tmp_path / "merged", current=layouts[1])
    patch = load_patch(adapter)
    (found,) = checked(adapter, base, merged, full=True).patches
    size = sum(
        (delta.scale * (b @ a)).square().sum().item()
        for delta in (*patch.deltas.values(), *patch.experts.values())
        for a, b in _factors(delta)
    )
    assert found.delta_sq == pytest.approx(size, rel=1e-3)
    assert found.alignment.cosine == pytest.approx(1.0, abs=1e-3)
    assert found.size_against_drift == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "reads", "expected"),
    [
        ("llama", True, Answer.HOLDS_ALIGNED),
        ("llama", False, Answer.UNCERTAIN),
        ("qwen3-moe", True, Answer.UNCERTAIN),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_no_patch_is_said_to_hold_aligned_on_a_model_that_align_refuses(kind, reads, expected, tmp_path):
    from tests import families

    how = {"dtype": torch.float32, "tied": False}
    base = families.make_base(kind, tmp_path / "base", current=True, seed=0, **how)
    tensors = load_file(base / "model.safetensors")
    evolved = shutil.copytree(base, tmp_path / "evolved")
    save_file({name: tensor * 1.005 for name, tensor in tensors.items()}, evolved / "model.safetensors")
    for folder in (base, evolved) if reads else ():
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    adapter = families.make_adapter(kind, base, tmp_path / "adapter", target_modules=["q_proj"])
    assert answer(checked(adapter, base, evolved, full=True)) is expected


def _factors(delta):
    from portllm.tensors.tensors import load

    a, b = load(delta.a).double(), load(delta.b).double()
    n = getattr(delta, "n_experts", 1)
    return [(part, b[:, number::n]) for number, part in enumerate(a.chunk(n))]


def test_a_change_of_the_function_is_a_doubt_and_one_of_positions_a_remark(tiny, changed):
    evolved = changed(config={"hidden_act": "gelu", "max_position_embeddings": 128})
    (patch,) = checked(tiny("adapter"), tiny("base"), evolved).patches
    assert patch.verdict.answer is Answer.UNCERTAIN
    assert patch.verdict.remarks == ("context length was 64 and is 128",)


def test_a_weight_that_is_not_a_number_is_named(tiny, changed):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        return tensors

    report = checked(tiny("adapter"), tiny("base"), changed(spoil))
    assert report.update.broken == ("model.layers.1.mlp.up_proj.weight",)
    assert answer(report) is Answer.WILL_NOT_HOLD


@pytest.mark.parametrize("full", [False, True])
def test_each_patch_is_judged_as_if_it_were_alone_and_the_models_are_read_once(tiny, full, monkeypatch):
    base, evolved = tiny("base"), tiny("evolved", drift=SHORT)
    adapters = [tiny("adapter", target_modules=[kind]) for kind in ("q_proj", "up_proj", "down_proj")]
    monkeypatch.setattr(measured_update, "COLUMN_ELEMENTS", 1000)  # fewer than `MOST_COLUMNS` of each weight
    alone = [checked(adapter, base, evolved, full=full) for adapter in adapters]
    read = []
    sample_drift = measured_update.sample_drift
    monkeypatch.setattr(measured_update, "sample_drift", lambda pairs: read.append(len(pairs)) or sample_drift(pairs))
    models = {"base": open_checkpoint(base), "evolved": open_checkpoint(evolved)}
    together = check_weights(*map(load_patch, adapters), **models, full=full)
    assert len(read) == 1
    for one, other in zip(alone, together.patches, strict=True):
        assert patch_to_json(one.patches[0]) == patch_to_json(other)
        assert update_to_json(one.update) == update_to_json(together.update)


@pytest.mark.parametrize("full", [False, True])
def test_patches_of_one_recipe_are_judged_as_if_each_were_alone(tmp_path, full):
    from tests import models

    base = models.make_base(tmp_path / "base")
    evolved = models.make_evolved(base, tmp_path / "evolved", drift=SHORT)
    adapters = [models.make_adapter(base, tmp_path / f"{seed}", seed=seed, size=0.1 * seed) for seed in (1, 2, 3)]
    alone = [checked(adapter, base, evolved, full=full) for adapter in adapters]
    patches = [outcome.value for outcome in open_each(find_patches(adapters), lambda patch, _: patch)]
    together = check_weights(*patches, base=open_checkpoint(base), evolved=open_checkpoint(evolved), full=full)
    assert [patch_to_json(one.patches[0]) for one in alone] == [patch_to_json(patch) for patch in together.patches]
    assert len({patch.delta_sq for patch in together.patches}) == len(adapters)


def test_few_factors_at_once_and_many_are_measured_alike(tiny, monkeypatch):
    whole = checked(tiny("adapter"), tiny("base"), tiny("evolved", drift=SHORT), full=True)
    monkeypatch.setattr(patch_measures, "MOST_ELEMENTS", 1)
    apart = checked(tiny("adapter"), tiny("base"), tiny("evolved", drift=SHORT), full=True)
    one, other = (patch_to_json(report.patches[0])["tensors"] for report in (whole, apart))
    for name, found in one.items():
        for number in ("norm", "cosine_with_drift"):
            assert found[number] == pytest.approx(other[name][number], rel=FLOAT32)
        for side, share in found["overlap"].items():
            assert share == pytest.approx(other[name]["overlap"][side], rel=FLOAT32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_patch_that_is_not_of_numbers_is_named(tmp_path, value):
    from tests import models

    base = models.make_base(tmp_path / "base")
    adapter = models.make_adapter(base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    tensors[key][0, 0] = value
    save_file(tensors, adapter / "adapter_model.safetensors")
    (patch,) = checked(adapter, base, models.make_evolved(base, tmp_path / "evolved", drift=SHORT)).patches
    assert patch.verdict.answer is Answer.WILL_NOT_HOLD
    assert "model.layers.1.mlp.up_proj.weight" in patch.verdict.reasons[0].text
    assert patch.changes["model.layers.0.mlp.up_proj.weight"].is_finite


def test_the_report_is_json_whatever_was_found(tiny):
    for evolved in (tiny("evolved"), tiny("base"), tiny("base", inner=24), tiny("base", tied=False)):
        report = checked(tiny("adapter"), tiny("base"), evolved)
        text = json.dumps([update_to_json(report.update), *map(patch_to_json, report.patches)], allow_nan=False)
        assert json.loads(text)[0]["lineage"] == str(report.update.lineage)


def test_windows_read_no_more_of_a_larger_model(tmp_path, monkeypatch):
    from tests.safetensors_files import write_sparse

    files = []
    for rows in (3_000, 300_000):
        tensors = {f"model.layers.{layer}.mlp.up_proj.weight": ("BF16", (rows, 700)) for layer in range(3)}
        files.append(write_sparse(tmp_path / f"{rows}.safetensors", tensors))
    sizes = []
    for file in files:
        model = open_checkpoint(file)
        sizes.append(check_weights(base=model, evolved=model).update.n_elements)
    assert sizes[0] == sizes[1] < 3 * 3_000 * 700


def test_quantized_weights_are_compared_by_the_values_they_stand_for(tmp_path):
    from tests.quantized import write_gguf

    weights = write_gguf(tmp_path / "base.gguf", storage="Q8_0")
    exact = {name: torch.from_numpy(values.copy()).to(torch.float32) for name, values in weights.items()}
    save_file(exact, tmp_path / "model.safetensors")
    base = open_checkpoint(tmp_path / "base.gguf")
    for full in (False, True):
        report = check_weights(base=base, evolved=open_checkpoint(tmp_path / "model.safetensors"), full=full)
        assert len(report.update.pairing.pairs) == len(weights)
        assert report.update.lineage is Lineage.SAME
