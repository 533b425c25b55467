"""Every supported kind of adapter against PEFT: merged, written back, carried over; and nothing of it left out."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.capturing.adapter import capture_adapter, plan_capture
from portllm.capturing.tuned import capture_tuned
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import AdapterFormatError, NonFiniteError
from portllm.matching.port_plan import plan_port
from portllm.matching.update import Update
from portllm.merging.merge import merge
from portllm.merging.options import MergeOptions
from portllm.merging.rounding_modes import Stochastic
from portllm.patch.adapter_config import NEUTRAL_VALUES
from portllm.patch.adapter_folder import folder_of, load_patch
from portllm.patch.adapter_keys import Role, parse_key
from portllm.porting.port import port
from portllm.tensors.tensors import load
from tests.adapter_matrix import BYTES, LAYOUT_KINDS, LAYOUTS, LOGITS, MAGNITUDES, MATRIX, REFUSED

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*tie"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),  # PEFT's guess at the bias of lora_B
]

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
LOGITS_TOLERANCE = 2e-5
"""Of the largest logit, in float32, where W x + B A x is summed in another order than (W + B A) x."""
HALF = ("plain", "embedding", "saved norms", "token rows", "bias of B", "dora")
"""Kinds that are also tried in float16."""
ROUNDED = (
    *HALF, "head", "conv1d", "conv1d and biases", "dora of conv1d", "positions of gpt2", "saved tied head",
    "saved tied embedding", "tied token rows of both", "trained biases", "saved block",
)  # fmt: skip
"""Kinds that are merged in bfloat16 by default: one of each sort of tensor; the others are those, named otherwise."""
CELLS = [
    *((kind, "F32") for kind in MATRIX),
    *((kind, "F16") for kind in HALF),
    *(pytest.param(kind, "BF16", marks=[] if kind in ROUNDED else pytest.mark.slow) for kind in MATRIX),
]


def kind_of(pair):
    """The kind of a cell, marked or not."""
    return getattr(pair, "values", pair)[0]


@dataclass(frozen=True)
class Cell:
    """A base, an adapter on it, and what PEFT makes of both; logits in float32 only."""

    base: Path
    adapter: Path
    logits: torch.Tensor | None
    merged: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """Makes each cell once: the base is in shards in bfloat16, in one file otherwise."""
    from tests import models

    made = {}

    def make(kind, dtype):
        if (kind, dtype) not in made:
            row = MATRIX[kind]
            how = {"max_shard_size": models.SEVERAL_SHARDS if dtype == "BF16" else "1GB", "dtype": DTYPES[dtype]}
            key = (row.model, dtype, json.dumps(row.base))
            if key not in made:
                made[key] = models.make_base(tmp_path_factory.mktemp("base"), kind=row.model, **how, **row.base)
            adapter = models.make_adapter(made[key], tmp_path_factory.mktemp("adapter"), **row.lora)
            exact = "auto" if row.merge == BYTES else torch.float32
            tuned = models.load_tuned(made[key], adapter, dtype=exact)
            logits = models.logits(tuned) if dtype == "F32" else None
            merged = {name: value.to(DTYPES[dtype]) for name, value in tuned.merge_and_unload().state_dict().items()}
            made[kind, dtype] = Cell(made[key], adapter, logits, merged)
        return made[kind, dtype]

    return make


def stored(folder):
    """Every tensor of a checkpoint."""
    return {name: load(info) for name, info in open_checkpoint(folder).infos.items()}


def model_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_close(found, expected):
    assert (found - expected).abs().max() < LOGITS_TOLERANCE * expected.abs().max()


def merged_by_us(case, out):
    merge(load_patch(case.adapter), into=open_checkpoint(case.base), out=out)
    return out


@pytest.fixture(scope="module")
def ours(cell, tmp_path_factory):
    """What we make of each kind in float32, once."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = merged_by_us(cell(kind, "F32"), tmp_path_factory.mktemp("ours") / "merged")
        return made[kind]

    return make


@pytest.mark.parametrize(("kind", "dtype"), [pair for pair in CELLS if MATRIX[kind_of(pair)].merge != LOGITS])
def test_merged_weights_are_those_of_peft(kind, dtype, cell, tmp_path):
    case = cell(kind, dtype)
    found = stored(merged_by_us(case, tmp_path / "out"))
    differing = [name for name, tensor in found.items() if not tensor.equal(case.merged[name])]
    assert differing == []
    base = stored(case.base)
    assert any(not tensor.equal(base[name]) for name, tensor in found.items() if name in base)


@pytest.mark.parametrize("kind", [kind for kind in MATRIX if MATRIX[kind].merge != BYTES or kind in HALF])
def test_a_merged_model_has_the_logits_of_the_adapter(kind, cell, ours):
    # Where the bytes are PEFT's, so are the logits: of these kinds, some show that transformers loads the folder.
    from tests.models import logits

    case = cell(kind, "F32")
    assert_close(logits(model_of(ours(kind))), case.logits)
    assert (logits(model_of(case.base)) - case.logits).abs().max() > 0.01


@pytest.mark.parametrize("kind", MATRIX)
def test_head_and_embedding_of_the_output_are_tied_as_the_table_says(kind, cell, ours):
    case, row = cell(kind, "F32"), MATRIX[kind]
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (case.base, ours(kind)))
    was_tied = before["tie_word_embeddings"]
    assert after["tie_word_embeddings"] == (was_tied and not row.untied)
    assert ("lm_head.weight" in stored(ours(kind))) == (not was_tied or row.untied)


@pytest.mark.parametrize("kind", MATRIX)
def test_a_captured_adapter_gives_the_same_logits_in_peft(kind, cell, tmp_path):
    from tests.models import load_tuned, logits

    case = cell(kind, "F32")
    capture_adapter(load_patch(case.adapter), base=open_checkpoint(case.base), out=tmp_path / "patch")
    assert logits(load_tuned(case.base, tmp_path / "patch")).equal(case.logits)


def expected_on(evolved, case, merged, *, has_magnitudes):
    """Evolved with every change of the adapter made by hand, in float32."""
    from tests.models import load_tuned

    base, tuned, later = stored(case.base), stored(merged), stored(evolved)
    model = model_of(evolved)
    if "lm_head.weight" in tuned and "lm_head.weight" not in base:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        embedding = next(name for name in base if name.endswith(("embed_tokens.weight", "wte.weight")))
        base["lm_head.weight"], later["lm_head.weight"] = base[embedding], later[embedding]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tuned:
                parameter += tuned[name] - base[name]
        tuned_layers = load_tuned(case.base, case.adapter).named_modules() if has_magnitudes else ()
        for name, layer in tuned_layers:
            if not getattr(layer, "lora_magnitude_vector", None):
                continue
            name = name.removeprefix("base_model.model.")
            delta = layer.get_delta_weight("default")
            axis = 0 if type(layer.base_layer).__name__ == "Conv1D" else 1
            norm = (base[f"{name}.weight"] + delta).norm(dim=axis, keepdim=True)
            magnitude = layer.lora_magnitude_vector["default"].weight.reshape(norm.shape)
            model.get_submodule(name).weight.copy_(magnitude / norm * (later[f"{name}.weight"] + delta))
    return model


@pytest.fixture(scope="module")
def evolved_of(tmp_path_factory):
    """Makes the later version of each base once."""
    from tests.models import make_evolved

    made = {}

    def make(base):
        if base not in made:
            made[base] = make_evolved(base, tmp_path_factory.mktemp("evolved"), drift=0.05)
        return made[base]

    return make


@pytest.mark.parametrize("kind", MATRIX)
def test_a_ported_adapter_does_to_the_evolved_model_what_it_did_to_the_base(kind, cell, ours, evolved_of, tmp_path):
    from tests.models import load_tuned, logits

    case = cell(kind, "F32")
    evolved = evolved_of(case.base)
    patch = load_patch(case.adapter)
    port(patch, base=open_checkpoint(case.base), evolved=open_checkpoint(evolved), out=tmp_path / "ported")
    expected = logits(expected_on(evolved, case, ours(kind), has_magnitudes=MATRIX[kind].port == MAGNITUDES))
    assert_close(logits(load_tuned(evolved, tmp_path / "ported")), expected)
    assert (case.logits - expected).abs().max() > 0.01


@pytest.mark.parametrize("kind", MATRIX)
def test_a_port_without_drift_changes_no_tensor(kind, cell, tmp_path):
    case = cell(kind, "BF16" if kind in ROUNDED else "F32")
    base = open_checkpoint(case.base)
    patch = capture_adapter(load_patch(case.adapter), base=base, out=tmp_path / "patch")
    port(patch, base=base, evolved=base, out=tmp_path / "ported")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("patch", "ported"))
    assert set(before) == set(after)
    assert [key for key in before if not before[key].double().equal(after[key].double())] == []


# ---- nothing is left out


def rewritten(case, folder, *, tensors=None, **fields):
    """A copy of a cell's adapter with other tensors or other fields."""
    shutil.copytree(case.adapter, folder)
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return folder


def refusal(case, folder):
    """What is said of an adapter on the cell's base; None if it is accepted."""
    try:
        refusals = plan_capture(load_patch(folder), base=open_checkpoint(case.base)).refusals
    except AdapterFormatError as error:
        return str(error)
    return "; ".join(map(str, refusals)) or None


@pytest.mark.parametrize("kind", MATRIX)
def test_an_adapter_that_lacks_any_of_its_tensors_is_refused(kind, cell, tmp_path):
    case = cell(kind, "F32")
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    accepted = []
    in_one_layer = [key for key in tensors if ".0." not in key]
    for number, key in enumerate(in_one_layer):
        rest = {other: value for other, value in tensors.items() if other != key}
        if refusal(case, rewritten(case, tmp_path / str(number), tensors=rest)) is None:
            accepted.append(key)
    # Copies of the base's weights are no part of what was learned.
    assert [key for key in accepted if parse_key(key)[1] is not Role.BASE_WEIGHT] == []


@pytest.mark.parametrize("kind", MATRIX)
def test_an_adapter_with_a_tensor_more_than_its_configuration_says_is_refused(kind, cell, tmp_path):
    case = cell(kind, "F32")
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    layer = "base_model.model.transformer.h.1" if MATRIX[kind].model == "gpt2" else "base_model.model.model.layers.1"
    more = (
        f"{layer}.other.lora_A.weight",
        f"{layer}.other.lora_magnitude_vector",
        f"{layer}.other.weight",
        f"{layer}.other.bias",
        f"{layer}.other.base_layer.bias",
        f"{layer}.other.base_layer.weight",
        f"{layer}.other.token_adapter.trainable_tokens_delta",
    )
    for number, key in enumerate(more):
        folder = rewritten(case, tmp_path / str(number), tensors={**tensors, key: torch.zeros(4, 12)})
        assert refusal(case, folder) is not None, key


FIELDS = {
    "modules_to_save": None,
    "trainable_token_indices": None,
    "bias": "none",
    "lora_bias": False,
    "use_dora": False,
    "target_modules": ["k_proj", "mlp.c_fc"],
    "r": 5,
}
"""Fields that go with tensors, and a value that does not go with those of the matrix."""


@pytest.mark.parametrize("kind", MATRIX)
def test_a_field_that_contradicts_the_tensors_is_refused(kind, cell, tmp_path):
    case = cell(kind, "F32")
    config = json.loads((case.adapter / "adapter_config.json").read_text())
    for name, value in FIELDS.items():
        if config[name] != value:
            folder = rewritten(case, tmp_path / name, **{name: value})
            # An embedding or a head that nothing names is as PEFT saves them with a new vocabulary.
            assert refusal(case, folder) is not None or (name == "modules_to_save" and counts_as_trained(case, folder))


def counts_as_trained(case, folder):
    (note,) = plan_capture(load_patch(folder), base=open_checkpoint(case.base)).notes
    return note.endswith("It counts as trained.")


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_table_calls_refused_is_refused(what, cell, tmp_path):
    fields, _ = REFUSED[what]
    case = cell("plain", "F32")
    name = next(iter(fields))
    said = refusal(case, rewritten(case, tmp_path / "adapter", **fields))
    assert name in said


def test_the_table_of_what_is_refused_has_every_foreign_field():
    named = {name for fields, _ in REFUSED.values() for name in fields}
    assert set(NEUTRAL_VALUES) <= named


def test_every_other_kind_of_adapter_of_peft_is_refused_by_its_name(cell, tmp_path):
    from peft import PeftType

    case = cell("plain", "F32")
    for kind in PeftType:
        if kind.value != "LORA":
            said = refusal(case, rewritten(case, tmp_path / kind.value, peft_type=kind.value))
            assert f"peft_type is '{kind.value}'" in said


# ---- other layouts


def in_layout(layout, key):
    for expression, other in LAYOUTS[layout].rewrites.items():
        key = re.sub(expression, other, key)
    return key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_with_other_keys_is_captured_as_peft_writes_it_or_refused(layout, cell, tmp_path):
    tried = 0
    for kind in LAYOUT_KINDS:
        case = cell(kind, "F32")
        tensors = load_file(case.adapter / "adapter_model.safetensors")
        others = {in_layout(layout, key): tensor for key, tensor in tensors.items()}
        if set(others) == set(tensors):
            continue
        tried += 1
        folder = rewritten(case, tmp_path / kind, tensors=others)
        if LAYOUTS[layout].why:
            assert LAYOUTS[layout].why in refusal(case, folder)
            continue
        base = open_checkpoint(case.base)
        capture_adapter(load_patch(folder), base=base, out=tmp_path / f"{kind} captured")
        capture_adapter(load_patch(case.adapter), base=base, out=tmp_path / f"{kind} expected")
        captured, expected = (
            tmp_path / f"{kind} {name}" / "adapter_model.safetensors" for name in ("captured", "expected")
        )
        assert captured.read_bytes() == expected.read_bytes()
    assert tried


def test_peft_reads_named_keys_of_a_default_adapter_as_they_are_read_here(cell, tmp_path):
    from tests.models import load_tuned, logits

    case = cell("plain", "F32")
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    folder = rewritten(case, tmp_path / "named", tensors={in_layout("named", key): t for key, t in tensors.items()})
    assert logits(load_tuned(case.base, folder)).equal(case.logits)


def test_a_tensor_that_is_there_by_two_names_is_refused(cell, tmp_path):
    case = cell("plain", "F32")
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    key = next(key for key in tensors if ".lora_A." in key)
    folder = rewritten(case, tmp_path / "twice", tensors={**tensors, in_layout("named", key): tensors[key].clone()})
    assert "under another name" in refusal(case, folder)


def test_a_program_that_loads_an_adapter_itself_is_not_given_one_that_it_would_drop(cell, tmp_path):
    case = cell("plain", "F32")
    assert folder_of(load_patch(case.adapter)) == case.adapter
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    folder = rewritten(case, tmp_path / "sql", tensors={in_layout("of another name", k): t for k, t in tensors.items()})
    with pytest.raises(AdapterFormatError, match="portllm capture"):
        folder_of(load_patch(folder))


@pytest.mark.parametrize(
    ("file", "found"), [("non_lora_trainables.bin", "modules_to_save"), ("adapters.safetensors", "mlx-lm")]
)
def test_what_was_trained_and_lies_in_another_file_is_not_left_out(file, found, cell, tmp_path):
    case = cell("plain", "F32")
    folder = rewritten(case, tmp_path / "adapter")
    (folder / file).write_bytes(b"trained")
    if file == "adapters.safetensors":
        (folder / "adapter_model.safetensors").unlink()
    assert found in refusal(case, folder)


# ---- what the table does not show


def test_token_rows_of_a_tied_embedding_with_a_delta_of_the_head_are_refused(tiny, tmp_path):
    base = tiny("base", dtype=torch.float32)
    fields = {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3]}
    adapter = tiny("adapter", of=base, **fields)
    refusals = plan_capture(load_patch(adapter), base=open_checkpoint(base)).refusals
    assert [refusal.where for refusal in refusals] == ["lm_head"]
    assert "PEFT would overwrite rows of the changed head" in refusals[0].reason


@pytest.mark.parametrize("was_tied", [True, False])
def test_token_rows_do_not_go_where_head_and_embedding_are_tied_otherwise(was_tied, tiny, tmp_path):
    base, other = (tiny("base", dtype=torch.float32, tied=tied) for tied in (was_tied, not was_tied))
    adapter = tiny("adapter", of=base, target_modules=["q_proj"], trainable_token_indices=[3])
    plan = plan_port(load_patch(adapter), Update(open_checkpoint(base), open_checkpoint(other)))
    (refusal,) = plan.refusals
    assert refusal.where == "model.embed_tokens.weight"
    assert "would change one without the other" in refusal.reason


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_an_adapter_that_keeps_ties_does_not_go_where_there_are_none(field, tiny):
    base, other = (tiny("base", dtype=torch.float32, tied=tied) for tied in (True, False))
    fields = {"target_modules": ["q_proj"], "ensure_weight_tying": True}
    fields[field] = [*fields.get(field, []), "embed_tokens"]
    adapter = tiny("adapter", of=base, **fields)
    plan = plan_port(load_patch(adapter), Update(open_checkpoint(base), open_checkpoint(other)))
    assert {refusal.where.removesuffix(".weight") for refusal in plan.refusals} == {"lm_head"}


def test_what_is_held_whole_is_not_ported_without_the_base(cell, tmp_path):
    case = cell("saved norms", "F32")
    patch = capture_adapter(load_patch(case.adapter), base=open_checkpoint(case.base), out=tmp_path / "patch")
    (refusal,) = plan_port(patch, Update(None, open_checkpoint(case.base))).refusals
    assert refusal.where == "--base"
    assert "replace the base's" in refusal.reason


@pytest.mark.parametrize(("one", "other"), [("BF16", "F32"), ("F32", "BF16"), ("F16", "BF16")])
@pytest.mark.parametrize("kind", ["saved norms", "token rows", "dora"])
def test_values_are_rebased_in_float32_between_models_of_other_dtypes(kind, one, other, tiny, tmp_path):
    row = MATRIX[kind]
    base = tiny("base", dtype=DTYPES[one], **row.base)
    source = tiny("base", dtype=DTYPES[other], seed=9, **row.base)
    patch = load_patch(tiny("adapter", of=base, **row.lora))
    ported = port(patch, base=open_checkpoint(base), evolved=open_checkpoint(source), out=tmp_path / "ported")
    before, after = stored(base), stored(source)
    for name, value in ported.values.items():
        assert value.values.dtype == "F32"
        assert load(value.values).equal(load(patch.values[name].values) + (after[name].float() - before[name].float()))
    for name, rows in ported.rows.items():
        places = list(rows.rows)
        moved = after[name][places].float() - before[name][places].float()
        assert load(rows.values).equal(load(patch.rows[name].values) + moved)
    for module, delta in ported.deltas.items():
        if kind == "dora":
            change = delta.scale * (load(delta.b).double() @ load(delta.a).double())
            norms = [(weights[f"{module}.weight"].double() + change).norm(dim=1) for weights in (before, after)]
            expected = load(patch.deltas[module].magnitude) * norms[1] / norms[0]
            assert (load(delta.magnitude) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_saved_values_are_rounded_once_from_the_file_to_the_dtype_asked_for(dtype, cell, tmp_path):
    case = cell("saved norms", "BF16")
    patch = load_patch(case.adapter)
    merge(patch, into=open_checkpoint(case.base), out=tmp_path / "out", options=MergeOptions(dtype=dtype))
    found = stored(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {DTYPES[dtype]}
    for name, value in patch.values.items():
        assert found[name].equal(load(value.values).to(DTYPES[dtype]))


def test_values_and_rows_are_rounded_by_chance_too(tiny, tmp_path):
    base = tiny("base", tied=False)
    fields = {"modules_to_save": ["norm"], "trainable_token_indices": [4]}
    patch = load_patch(tiny("adapter", of=base, target_modules=["q_proj"], **fields))
    merge(patch, into=open_checkpoint(base), out=tmp_path / "out", options=MergeOptions(rounding=Stochastic(3)))
    found = stored(tmp_path / "out")
    exact = {name: load(value.values) for name, value in patch.values.items()}
    (rows,) = patch.rows.values()
    found["rows"], exact["rows"] = found["model.embed_tokens.weight"][[4]], load(rows.values)
    nearest = True
    for name, value in exact.items():
        step = 2.0**-7 * value.abs()  # the distance of two bfloat16 numbers is at most that
        assert ((found[name].float() - value).abs() <= step).all()
        nearest &= found[name].equal(value.bfloat16())
    assert not nearest


def dora_on_zero_rows(tiny, tmp_path, **zero):
    """A base and an evolved model with or without a row of zeros, and a DoRA whose delta leaves that row alone."""
    models = {}
    for kind in ("base", "evolved"):
        source = tiny("base", dtype=torch.float32, seed={"base": 0, "evolved": 9}[kind])
        shutil.copytree(source, tmp_path / kind)
        tensors = load_file(source / "model.safetensors")
        if zero.get(kind):
            tensors["model.layers.0.self_attn.q_proj.weight"][2] = 0
        save_file(tensors, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
        models[kind] = open_checkpoint(tmp_path / kind)
    source = tiny("adapter", of=tiny("base", dtype=torch.float32), target_modules=["q_proj"], use_dora=True)
    shutil.copytree(source, tmp_path / "adapter")
    tensors = load_file(source / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][2] = 0
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    return load_patch(tmp_path / "adapter"), models["base"], models["evolved"]


def test_a_dora_of_a_row_of_zeros_is_not_merged(tiny, tmp_path):
    patch, base, _ = dora_on_zero_rows(tiny, tmp_path, base=True)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.self_attn\.q_proj"):
        merge(patch, into=base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("zero", ["base", "evolved"])
def test_a_dora_of_a_row_of_zeros_is_not_ported(zero, tiny, tmp_path):
    patch, base, evolved = dora_on_zero_rows(tiny, tmp_path, **{zero: True})
    with pytest.raises(NonFiniteError, match=r"layers\.0\.self_attn\.q_proj.*zero"):
        port(patch, base=base, evolved=evolved, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("says", [True, False])
def test_fan_in_fan_out_is_corrected_by_the_family_as_in_peft(says, tiny, cell, tmp_path):
    case = cell("conv1d", "F32")
    folder = rewritten(case, tmp_path / "adapter", fan_in_fan_out=says)
    merge(load_patch(folder), into=open_checkpoint(case.base), out=tmp_path / "out")
    found = stored(tmp_path / "out")
    assert [name for name, tensor in found.items() if not tensor.equal(case.merged[name])] == []
    # And a square matrix of a model of nn.Linear is not turned round.
    case = cell("plain", "F32")
    folder = rewritten(case, tmp_path / "linear", fan_in_fan_out=says)
    merge(load_patch(folder), into=open_checkpoint(case.base), out=tmp_path / "linear out")
    assert stored(tmp_path / "linear out")["model.layers.0.self_attn.q_proj.weight"].equal(
        case.merged["model.layers.0.self_attn.q_proj.weight"]
    )


def test_a_checkpoint_saved_without_its_head_takes_the_same_adapter(cell, tmp_path):
    case = cell("conv1d and biases", "F32")
    shutil.copytree(case.base, tmp_path / "headless")
    tensors = load_file(case.base / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "headless" / "model.safetensors", metadata={"format": "pt"})
    merge(load_patch(case.adapter), into=open_checkpoint(tmp_path / "headless"), out=tmp_path / "out")
    found = stored(tmp_path / "out")
    assert set(found) == set(bare)
    assert [name for name, tensor in found.items() if not tensor.equal(case.merged[f"transformer.{name}"])] == []


@pytest.mark.parametrize("dense", ["keep", "drop"])
def test_a_patch_of_two_gpt2_models_is_what_peft_loads(dense, tmp_path):
    from tests.models import load_tuned, logits, make_base, make_evolved

    base = make_base(tmp_path / "base", kind="gpt2", dtype=torch.float32)
    tuned = make_evolved(base, tmp_path / "tuned", drift=0.05)
    capture_tuned(open_checkpoint(base), open_checkpoint(tuned), out=tmp_path / "patch", rank=12, dense=dense)
    patch = load_patch(tmp_path / "patch")
    assert all(delta.transposed for delta in patch.deltas.values())
    found = logits(load_tuned(base, tmp_path / "patch"))
    merge(patch, into=open_checkpoint(base), out=tmp_path / "merged")
    assert_close(logits(model_of(tmp_path / "merged")), found)
    if dense == "keep":
        expected = logits(model_of(tuned))
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
