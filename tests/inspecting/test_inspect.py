"""Inspect: what a checkpoint, an adapter or a patch is said to be."""

import json

import pytest

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.model.identity import digest, fingerprint
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import AdapterFormatError, NotFoundError
from portllm.inspecting.inspect import inspect, summary_to_json
from portllm.patch.adapter_folder import load_patch
from tests.safetensors_files import write_tensors

MATRICES = {
    "q_proj 18x12": 2,
    "k_proj 6x12": 2,
    "v_proj 6x12": 2,
    "o_proj 12x18": 2,
    "gate_proj 20x12": 2,
    "up_proj 20x12": 2,
    "down_proj 12x20": 2,
}


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_described(tied, tiny):
    folder = tiny("base", tied=tied, max_shard_size="3KB")
    opened = open_checkpoint(folder)
    found = inspect(folder)
    assert found.name == str(folder)
    assert found.architecture == "LlamaForCausalLM"
    assert (found.fingerprint, found.digest) == (fingerprint(opened), None)
    assert found.n_params == sum(info.n_params for info in opened.infos.values())
    assert found.n_bytes == 2 * found.n_params
    assert (found.n_tensors, found.files) == (len(opened.infos), len(list(folder.glob("*.safetensors"))))
    assert found.dtypes == {"BF16": found.n_tensors}
    assert found.modules == {**MATRICES, "lm_head 31x12": 1}
    assert found.tied_head is tied


def test_the_digest_is_taken_when_it_is_asked_for(tiny):
    told = []
    found = inspect(tiny("base"), with_digest=True, progress=lambda *now: told.append(now))
    assert found.digest == digest(open_checkpoint(tiny("base")))
    assert told[-1][1] == told[-1][2] == found.n_bytes


def test_a_file_without_configuration_is_described_without_an_architecture(tmp_path):
    file = write_tensors(tmp_path / "m.safetensors", {"a.weight": ("F32", (3, 2), bytes(24)), "n": ("I8", (1,), b"x")})
    found = inspect(file)
    assert (found.architecture, found.tied_head, found.modules) == (None, False, {"a 3x2": 1})
    assert found.dtypes == {"F32": 1, "I8": 1}


def test_an_adapter_is_described(tiny):
    folder = tiny("adapter", rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 8})
    found = inspect(folder)
    assert (found.n_modules, set(found.modules.values())) == (14, {2})
    assert found.ranks == {2: 2, 4: 12}
    assert found.scales == {1.5: 10, 2.0: 2, 3.0: 2}
    assert found.n_params == load_patch(folder).n_params
    assert found.n_bytes == 4 * found.n_params
    assert found.base_name == str(tiny("base"))
    assert found.record is None


def test_a_patch_is_described_with_its_record(tiny, tmp_path):
    patch = capture_adapter(load_patch(tiny("adapter")), base=open_checkpoint(tiny("base")), out=tmp_path / "patch")
    assert inspect(tmp_path / "patch").record == patch.record


def test_a_summary_survives_json(tiny, tmp_path):
    capture_adapter(load_patch(tiny("adapter")), base=open_checkpoint(tiny("base")), out=tmp_path / "patch")
    kinds = {}
    for place in (tiny("base"), tiny("adapter"), tmp_path / "patch"):
        value = summary_to_json(inspect(place))
        kinds[value["kind"]] = json.loads(json.dumps(value))
    assert list(kinds) == ["checkpoint", "adapter", "patch"]
    assert kinds["checkpoint"]["modules"] == {**MATRICES, "lm_head 31x12": 1}
    assert kinds["adapter"]["record"] is None
    said = json.loads((tmp_path / "patch" / "patch.json").read_text())
    assert {**kinds["patch"]["record"], "seal": said["seal"]} == said
    assert kinds["patch"]["ranks"] == {"4": 14}


def test_what_is_neither_is_refused(tmp_path):
    with pytest.raises(NotFoundError):
        inspect(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterFormatError):
        inspect(tmp_path)
