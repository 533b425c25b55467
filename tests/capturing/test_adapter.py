"""Capture: an adapter becomes a patch that knows its base, or is refused."""

import shutil

import pytest

from portllm import __version__
from portllm.capturing.adapter import capture_adapter, plan_capture
from portllm.checking.check import check_weights
from portllm.checking.verdict import Answer
from portllm.checkpoint.model.identity import fingerprint
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import NonFiniteError, OutputError, OutputExistsError, PlanRefusedError
from portllm.merging.merge import merge
from portllm.patch.adapter_folder import TENSOR_FILE, digest_tensors, load_patch
from portllm.porting.port import port
from tests.safetensors_files import contents


def test_a_captured_patch_has_the_tensors_of_the_adapter_and_knows_its_base(tiny, tmp_path):
    adapter, base = load_patch(tiny("adapter")), open_checkpoint(tiny("base"))
    before = contents(tiny("adapter"))
    patch = capture_adapter(adapter, base=base, out=tmp_path / "patch", settings={"from": "a test"})
    assert {module: delta.scale for module, delta in patch.deltas.items()} == {
        module: delta.scale for module, delta in adapter.deltas.items()
    }
    assert digest_tensors(patch) == digest_tensors(adapter) == patch.record.tensors
    assert (patch.record.base.name, patch.record.base.fingerprint) == (str(tiny("base")), fingerprint(base))
    assert (patch.record.capture.method, patch.record.capture.settings) == ("adapter", {"from": "a test"})
    assert (patch.record.ports, patch.record.program) == ((), __version__)
    assert contents(tiny("adapter")) == before


def test_capturing_again_gives_the_same_bytes(tiny, tmp_path):
    for name in ("first", "second"):
        capture_adapter(load_patch(tiny("adapter")), base=open_checkpoint(tiny("base")), out=tmp_path / name)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_a_captured_patch_gives_the_same_logits_in_peft(tiny, tmp_path):
    from tests.models import load_tuned, logits

    adapter = tiny("adapter", use_rslora=True, rank_pattern={"up_proj": 2})
    capture_adapter(load_patch(adapter), base=open_checkpoint(tiny("base")), out=tmp_path / "patch")
    assert logits(load_tuned(tiny("base"), tmp_path / "patch")).equal(logits(load_tuned(tiny("base"), adapter)))


def refused(adapter, base, tmp_path):
    before = contents(tmp_path)
    with pytest.raises(PlanRefusedError) as error:
        capture_adapter(adapter, base=base, out=tmp_path / "out")
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()
    assert error.value.refusals == plan_capture(adapter, base=base).refusals
    return {refusal.where: refusal.reason for refusal in error.value.refusals}


@pytest.mark.parametrize(("how", "count"), [({"inner": 24}, 6), ({"layers": 1}, 7), ({"layers": 3}, 7)])
def test_an_adapter_that_does_not_fit_is_refused_with_every_module(how, count, tiny, tmp_path):
    assert len(refused(load_patch(tiny("adapter")), open_checkpoint(tiny("base", **how)), tmp_path)) == count


def test_a_patch_is_not_captured_again(tiny, tmp_path):
    base = open_checkpoint(tiny("base"))
    patch = capture_adapter(load_patch(tiny("adapter")), base=base, out=tmp_path / "patch")
    reasons = refused(patch, base, tmp_path)
    assert set(reasons) == {"--adapter"}
    assert "is already a patch: its patch.json names" in reasons["--adapter"]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_the_head_of_another_base_is_refused(tied, tiny, tmp_path):
    base = tiny("base", tied=tied)
    adapter = load_patch(tiny("adapter", of=base, target_modules=["q_proj", "lm_head"]))
    reasons = refused(adapter, open_checkpoint(tiny("base", tied=tied, seed=5)), tmp_path)
    assert set(reasons) == {"lm_head"}
    assert plan_capture(adapter, base=open_checkpoint(base)).refusals == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_number_that_is_none_is_refused_by_its_name_wherever_a_patch_goes(value, dtype, tiny, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    adapter = shutil.copytree(tiny("adapter"), tmp_path / "adapter")
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(adapter / TENSOR_FILE).items()}
    name = sorted(tensors)[-1]
    tensors[name][-1, -1] = value
    save_file(tensors, adapter / TENSOR_FILE)
    base, evolved = open_checkpoint(tiny("base")), open_checkpoint(tiny("evolved"))
    ways = (
        lambda: capture_adapter(load_patch(adapter), base=base, out=tmp_path / "out"),
        lambda: port(load_patch(adapter), base=base, evolved=evolved, out=tmp_path / "out"),
        lambda: merge(load_patch(adapter), into=base, out=tmp_path / "out"),
    )
    for way in ways:
        with pytest.raises(NonFiniteError, match=name.removeprefix("base_model.model.").rpartition(".lora")[0]):
            way()
        assert not (tmp_path / "out").exists()
    found = check_weights(load_patch(adapter), base=base, evolved=evolved).patches[0].verdict
    assert found.answer is Answer.WILL_NOT_HOLD
    assert "contains an infinity or NaN" in found.reasons[0].text


def test_an_output_that_exists_is_refused_and_kept(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    adapter, base = load_patch(tiny("adapter")), open_checkpoint(tiny("base"))
    with pytest.raises(OutputExistsError):
        capture_adapter(adapter, base=base, out=tmp_path / "out")
    assert contents(tmp_path) == {"out/mine": b"x"}


def test_a_capture_never_replaces_the_adapter_or_the_base(tiny):
    adapter, base = load_patch(tiny("adapter")), open_checkpoint(tiny("base"))
    before = contents(tiny("adapter")), contents(tiny("base"))
    for out in (tiny("adapter"), tiny("base")):
        with pytest.raises(OutputError, match="which is an input"):
            capture_adapter(adapter, base=base, out=out, overwrite=True)
    assert (contents(tiny("adapter")), contents(tiny("base"))) == before


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
def test_a_copy_of_the_head_that_an_adapter_holds_in_float32_is_that_of_the_base(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    base = tiny("base", tied=False)
    adapter = shutil.copytree(tiny("adapter", of=base, target_modules=["q_proj", "lm_head"]), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.lm_head.base_layer.weight"
    save_file({**tensors, key: tensors[key].float()}, file)
    assert plan_capture(load_patch(adapter), base=open_checkpoint(base)).refusals == ()
    save_file({**tensors, key: tensors[key].float() + 1e-4}, file)
    refusals = plan_capture(load_patch(adapter), base=open_checkpoint(base)).refusals
    assert [refusal.where for refusal in refusals] == ["lm_head"]
