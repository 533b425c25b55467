"""Merged bytes equal PEFT's, tensor for tensor, over LoRA configurations, dtypes and shard layouts."""

import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import portllm
from portllm.merging.options import MergeOptions

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SUBSETS = (
    ["q_proj", "v_proj"],
    ["k_proj", "o_proj", "up_proj"],
    ["down_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "all-linear",
    r"model\.layers\.1\..*_proj",
    ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"],
)


def tensors_of(folder):
    """Every stored tensor of a checkpoint folder, by name, read by the safetensors library."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                found[name] = opened.get_tensor(name)
    return found


def assert_equal_bytes(ours, theirs):
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


@dataclass(frozen=True)
class Case:
    dtype: str
    tied: bool
    sharded: bool
    lora: dict
    adapter_dtype: str


@st.composite
def cases(draw):
    subset = draw(st.sampled_from(SUBSETS))
    lora = {"target_modules": subset, "r": draw(st.integers(1, 9)), "lora_alpha": draw(st.integers(1, 40))}
    if draw(st.booleans()):
        lora["use_rslora"] = True
    elif draw(st.booleans()):
        lora["rank_pattern"] = {r"layers\.0\..*": draw(st.integers(1, 6)), "up_proj": 3}
        lora["alpha_pattern"] = {"down_proj": draw(st.integers(1, 30)), r"layers.1.self_attn.(q|v)_proj": 5}
    if isinstance(subset, list) and not subset[0].startswith("model") and draw(st.booleans()):
        lora["layers_to_transform"] = draw(st.sampled_from([[0], [1], 1, [0, 1]]))
        lora["layers_pattern"] = draw(st.sampled_from([None, "layers", ["layers"]]))
    elif draw(st.booleans()):
        lora["exclude_modules"] = draw(st.sampled_from([["layers.0.self_attn.k_proj"], r".*layers\.0\.mlp.*"]))
    return Case(
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        tied=draw(st.booleans()),
        sharded=draw(st.booleans()),
        lora=lora,
        adapter_dtype=draw(st.sampled_from(sorted(DTYPES))),
    )


@given(case=cases())
@settings(
    max_examples=int(os.environ.get("PORTLLM_FUZZ_EXAMPLES", "12")),
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # an example costs half a second, and the first failing one says enough
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@pytest.mark.filterwarnings("ignore")  # peft warns of patterns that match nothing; we measure what it computes
def test_merged_bytes_equal_those_of_peft(case, tiny, tmp_path_factory):
    from tests import models

    folder = tmp_path_factory.mktemp("case")
    size = models.SEVERAL_SHARDS if case.sharded else "1GB"
    base = tiny("base", dtype=DTYPES[case.dtype], tied=case.tied, max_shard_size=size)
    try:
        adapter = models.make_adapter(base, folder / "adapter", dtype=DTYPES[case.adapter_dtype], **case.lora)
    except ValueError:  # PEFT refuses a configuration that names no module
        return
    expected = models.merge_with_peft(base, adapter, folder / "peft", max_shard_size=size)

    into = portllm.open_checkpoint(base)
    portllm.merge(
        portllm.load_patch(adapter),
        into=into,
        out=folder / "ours",
        options=MergeOptions(shard_bytes=4000 if case.sharded else 10**9),
    )

    assert_equal_bytes(tensors_of(folder / "ours"), tensors_of(expected))
