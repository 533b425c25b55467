"""Every supported kind of adapter against PEFT: merged, written back, carried over; and nothing of it left out."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.checkpoint.reader import open_checkpoint
from portllm.checkpoint.tensors import load
from portllm.errors import AdapterFormatError
from portllm.patch.adapter_config import BASE_PRESERVING_INITS, NEUTRAL_VALUES
from portllm.patch.adapter_folder import load_patch
from portllm.patch.adapter_keys import Role, parse_key
from portllm.pipeline.capture import capture_adapter, plan_capture
from portllm.pipeline.merge import merge
from portllm.pipeline.port import port
from tests.adapter_matrix import BYTES, LOGITS, MATRIX, REFUSED

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
CELLS = [(kind, dtype) for kind in MATRIX for dtype in ("BF16", "F32")] + [(kind, "F16") for kind in HALF]


@dataclass(frozen=True)
class Cell:
    """A base, an adapter on it, and what PEFT makes of both."""

    base: Path
    adapter: Path
    logits: torch.Tensor
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
            tuned = models.load_tuned(made[key], adapter)
            logits = models.logits(tuned)
            if row.merge != BYTES and dtype != "F32":
                tuned = models.load_tuned(made[key], adapter, dtype=torch.float32)
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


def merged_by_us(cell, out):
    merge(load_patch(cell.adapter), into=open_checkpoint(cell.base), out=out)
    return out


@pytest.mark.parametrize(("kind", "dtype"), [pair for pair in CELLS if MATRIX[pair[0]].merge != LOGITS])
def test_merged_weights_are_those_of_peft(kind, dtype, cell, tmp_path):
    case = cell(kind, dtype)
    found = stored(merged_by_us(case, tmp_path / "out"))
    differing = [name for name, tensor in found.items() if not tensor.equal(case.merged[name])]
    assert differing == []
    base = stored(case.base)
    assert any(not tensor.equal(base[name]) for name, tensor in found.items() if name in base)


@pytest.mark.parametrize("kind", MATRIX)
def test_a_merged_model_has_the_logits_of_the_adapter(kind, cell, tmp_path):
    from tests.models import logits

    case = cell(kind, "F32")
    assert_close(logits(model_of(merged_by_us(case, tmp_path / "out"))), case.logits)
    assert (logits(model_of(case.base)) - case.logits).abs().max() > 0.01


@pytest.mark.parametrize("kind", MATRIX)
def test_head_and_embedding_of_the_output_are_tied_as_the_table_says(kind, cell, tmp_path):
    case, row = cell(kind, "F32"), MATRIX[kind]
    merged_by_us(case, tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (case.base, tmp_path / "out"))
    was_tied = before["tie_word_embeddings"]
    assert after["tie_word_embeddings"] == (was_tied and not row.untied)
    assert ("lm_head.weight" in stored(tmp_path / "out")) == (not was_tied or row.untied)


@pytest.mark.parametrize("kind", MATRIX)
def test_a_captured_adapter_gives_the_same_logits_in_peft(kind, cell, tmp_path):
    from tests.models import load_tuned, logits

    case = cell(kind, "F32")
    capture_adapter(load_patch(case.adapter), base=open_checkpoint(case.base), out=tmp_path / "patch")
    assert logits(load_tuned(case.base, tmp_path / "patch")).equal(case.logits)


def expected_on(evolved, case, merged):
    """Evolved with every change of the adapter made by hand, in float32."""
    from tests.models import load_tuned

    base, tuned = stored(case.base), stored(merged)
    model = model_of(evolved)
    if "lm_head.weight" in tuned and "lm_head.weight" not in base:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        embedding = next(name for name in base if name.endswith(("embed_tokens.weight", "wte.weight")))
        base["lm_head.weight"] = base[embedding]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tuned:
                parameter += tuned[name] - base[name]
        for name, layer in load_tuned(case.base, case.adapter).named_modules():
            if not getattr(layer, "lora_magnitude_vector", None):
                continue
            name = name.removeprefix("base_model.model.")
            delta = layer.get_delta_weight("default")
            axis = 0 if type(layer.base_layer).__name__ == "Conv1D" else 1
            norm = (base[f"{name}.weight"] + delta).norm(dim=axis, keepdim=True)
            magnitude = layer.lora_magnitude_vector["default"].weight.reshape(norm.shape)
            weight = stored(evolved)[f"{name}.weight"]
            model.get_submodule(name).weight.copy_(magnitude / norm * (weight + delta))
    return model


@pytest.mark.parametrize("kind", MATRIX)
def test_a_ported_adapter_does_to_the_evolved_model_what_it_did_to_the_base(kind, cell, tmp_path):
    from tests.models import load_tuned, logits, make_evolved

    case = cell(kind, "F32")
    evolved = make_evolved(case.base, tmp_path / "evolved", drift=0.05)
    patch = load_patch(case.adapter)
    port(patch, base=open_checkpoint(case.base), evolved=open_checkpoint(evolved), out=tmp_path / "ported")
    expected = logits(expected_on(evolved, case, merged_by_us(case, tmp_path / "merged")))
    assert_close(logits(load_tuned(evolved, tmp_path / "ported")), expected)
    assert (case.logits - expected).abs().max() > 0.01


@pytest.mark.parametrize("kind", MATRIX)
def test_a_port_without_drift_changes_no_tensor(kind, cell, tmp_path):
    case = cell(kind, "BF16")
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
        refusals = plan_capture(load_patch(folder), base=open_checkpoint(case.base))
    except AdapterFormatError as error:
        return str(error)
    return "; ".join(map(str, refusals)) or None


@pytest.mark.parametrize("kind", MATRIX)
def test_an_adapter_that_lacks_any_of_its_tensors_is_refused(kind, cell, tmp_path):
    case = cell(kind, "F32")
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    accepted = []
    for number, key in enumerate(tensors):
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
            assert refusal(case, folder) is not None, name


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_table_calls_refused_is_refused(what, cell, tmp_path):
    fields, _ = REFUSED[what]
    case = cell("plain", "F32")
    (name,) = fields
    said = refusal(case, rewritten(case, tmp_path / "adapter", **fields))
    assert name in said


def test_the_table_of_what_is_refused_has_every_foreign_field():
    named = {name for fields, _ in REFUSED.values() for name in fields}
    trained = {"corda_config", "loftq_config", "lora_ga_config"}  # they come with their own init_lora_weights
    assert set(NEUTRAL_VALUES) - trained <= named


def test_every_other_kind_of_adapter_of_peft_is_refused_by_its_name(cell, tmp_path):
    from peft import PeftType

    case = cell("plain", "F32")
    for kind in PeftType:
        if kind.value != "LORA":
            said = refusal(case, rewritten(case, tmp_path / kind.value, peft_type=kind.value))
            assert f"peft_type is '{kind.value}'" in said


def test_every_start_of_peft_that_changes_the_base_is_refused(cell, tmp_path):
    case = cell("plain", "F32")
    for init in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", "kasa"):
        assert init not in BASE_PRESERVING_INITS
        assert "init_lora_weights" in refusal(case, rewritten(case, tmp_path / init, init_lora_weights=init))
