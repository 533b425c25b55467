"""Porting: what PEFT makes of a ported adapter, its record, and everything that is refused before a byte is written."""

import json
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.model.identity import fingerprint
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import OutputError, OutputExistsError, PlanRefusedError, UnknownMethodError
from portllm.matching.port_plan import plan_port
from portllm.matching.update import Update
from portllm.patch.adapter_folder import digest_tensors, files_of, load_patch
from portllm.porting.port import port, port_each
from portllm.tensors.info import TensorInfo
from portllm.tensors.windows import SAMPLE_BYTES
from tests.safetensors_files import contents, write_sparse, write_tensors

LOGITS_TOLERANCE = 2e-5
"""Of logits of size 10 in float32, where W x + B A x is summed in another order than (W + B A) x."""


def capture(adapter, base, out):
    return capture_adapter(load_patch(adapter), base=open_checkpoint(base), out=out)


def refusals(patch, **how):
    return {refusal.where: refusal.reason for refusal in plan_port(patch, **how).refusals}


def add_by_hand(base, patch):
    """The model with every delta added to its weight, all of it in float32."""
    from transformers import LlamaForCausalLM

    from portllm.tensors.tensors import load

    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        for module, delta in patch.deltas.items():
            model.get_submodule(module).weight += delta.scale * (load(delta.b).float() @ load(delta.a).float())
    return model


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3}},
        {"target_modules": r".*\.1\..*(q|down)_proj", "dtype": torch.bfloat16},
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_ported_adapter_gives_the_logits_of_the_delta_added_by_hand(lora, tied, tiny, tmp_path):
    from tests.models import load_tuned, logits

    base = tiny("base", dtype=torch.float32, tied=tied)
    evolved = tiny("evolved", of=base, drift=0.05)
    patch = capture(tiny("adapter", of=base, **lora), base, tmp_path / "patch")
    ported = port(patch, evolved=open_checkpoint(evolved), out=tmp_path / "ported")

    expected = logits(add_by_hand(evolved, patch))
    found = logits(load_tuned(evolved, tmp_path / "ported", dtype=torch.float32))
    assert (found - expected).abs().max() < LOGITS_TOLERANCE * expected.abs().max()
    assert (logits(add_by_hand(base, patch)) - expected).abs().max() > 0.01
    assert ported.record.base.fingerprint == fingerprint(open_checkpoint(evolved))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_ported_adapter_of_the_head_leaves_the_evolved_head_in_its_place(tiny, tmp_path):
    from tests.models import load_tuned, logits

    base = tiny("base", dtype=torch.float32, tied=False)
    evolved = tiny("evolved", of=base, drift=0.05)
    adapter = tiny("adapter", of=base, target_modules=["q_proj", "lm_head"])
    patch = load_patch(adapter)
    port(patch, evolved=open_checkpoint(evolved), base=open_checkpoint(base), out=tmp_path / "ported")

    expected = logits(add_by_hand(evolved, patch))
    found = logits(load_tuned(evolved, tmp_path / "ported", dtype=torch.float32))
    assert (found - expected).abs().max() < LOGITS_TOLERANCE * expected.abs().max()
    # PEFT itself puts the old base's head over the evolved one when it loads the adapter as it is.
    assert (logits(load_tuned(evolved, adapter, dtype=torch.float32)) - expected).abs().max() > 0.01


def test_the_tensors_of_a_port_by_addition_are_those_of_the_patch(tiny, tmp_path):
    patch = capture(tiny("adapter"), tiny("base"), tmp_path / "patch")
    before = contents(tmp_path / "patch")
    ported = port(patch, evolved=open_checkpoint(tiny("evolved")), out=tmp_path / "ported")
    after = contents(tmp_path / "ported")
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "patch.json"}
    assert set(after) == set(before) == files
    assert after["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert contents(tmp_path / "patch") == before
    assert ported.record.tensors == digest_tensors(patch)
    config = json.loads(after["adapter_config.json"])
    assert config["base_model_name_or_path"] == str(tiny("evolved"))


def test_a_chain_of_ports_is_recorded_from_the_first_base_on(tiny, tmp_path):
    places = [tiny("base"), tiny("evolved"), tiny("evolved", of=tiny("evolved"), seed=7)]
    models = [open_checkpoint(place) for place in places]
    patch = capture(tiny("adapter"), places[0], tmp_path / "patch")
    first = port(patch, evolved=models[1], base=models[0], out=tmp_path / "first")
    second = port(first, evolved=models[2], out=tmp_path / "second")

    prints = [fingerprint(model) for model in models]
    assert len(set(prints)) == 3
    assert patch.record.base.fingerprint == prints[0]
    assert patch.record.ports == ()
    assert second.record.base.fingerprint == prints[2]
    steps = [(step.source.fingerprint, step.target.fingerprint, step.method) for step in second.record.ports]
    assert steps == [(prints[0], prints[1], "add"), (prints[1], prints[2], "add")]
    assert second.record.capture == patch.record.capture
    assert set(first.record.ports[0].evidence) == {"sampled_drift", "sampled_cosine"}
    assert second.record.ports[1].evidence == {}
    assert second.record.ports[0] == first.record.ports[0]


def test_an_adapter_without_a_record_is_ported_when_its_base_is_named(tiny, tmp_path):
    base = open_checkpoint(tiny("base"))
    ported = port(
        load_patch(tiny("adapter")), evolved=open_checkpoint(tiny("evolved")), base=base, out=tmp_path / "ported"
    )
    (step,) = ported.record.ports
    assert (step.source.fingerprint, ported.record.capture.method) == (fingerprint(base), "adapter")


def test_porting_again_gives_the_same_bytes(tiny, tmp_path):
    for name in ("first", "second"):
        port(
            load_patch(tiny("adapter")),
            evolved=open_checkpoint(tiny("evolved")),
            base=open_checkpoint(tiny("base")),
            out=tmp_path / name,
        )
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_the_sampled_drift_of_small_tensors_is_their_drift(tiny):
    from portllm.checking.update.drift import measure_drift

    base, evolved = (open_checkpoint(tiny(kind)) for kind in ("base", "evolved"))
    patch = load_patch(tiny("adapter"))
    report = measure_drift(base, evolved)
    sums = [report.tensors[f"{module}.weight"] for module in patch.deltas]
    drift = math.sqrt(sum(part.drift_sq for part in sums) / sum(part.base_sq for part in sums))
    evidence = plan_port(patch, Update(base, evolved)).evidence
    assert evidence["sampled_drift"] == pytest.approx(drift, rel=1e-2)
    assert 0.9 < evidence["sampled_cosine"] < 1.0


def q_proj_patch(folder, d_out, d_in, *, name="q_proj"):
    folder.mkdir()
    prefix = f"base_model.model.{name}"
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = {f"{prefix}.lora_A.weight": ("F32", (1, d_in)), f"{prefix}.lora_B.weight": ("F32", (d_out, 1))}
    write_sparse(folder / "adapter_model.safetensors", factors)
    return load_patch(folder)


def floats(values, dtype):
    from portllm.tensors.tensors import TORCH_DTYPES, encode

    return dtype, tuple(values.shape), bytes(encode(values.to(TORCH_DTYPES[dtype])))


def test_the_same_elements_are_compared_when_the_evolved_model_has_another_dtype(tmp_path):
    values = torch.linspace(-1, 1, 100 * 200).reshape(100, 200).bfloat16().float()
    base = write_tensors(tmp_path / "base.safetensors", {"q_proj.weight": floats(values, "BF16")})
    evolved = write_tensors(tmp_path / "evolved.safetensors", {"q_proj.weight": floats(values * 1.25, "F32")})
    patch = q_proj_patch(tmp_path / "adapter", 100, 200)
    for one, other in ((base, evolved), (evolved, base)):
        evidence = plan_port(patch, Update(open_checkpoint(one), open_checkpoint(other))).evidence
        assert evidence["sampled_cosine"] == pytest.approx(1.0, abs=1e-4)
        assert evidence["sampled_drift"] == pytest.approx(0.25 if one is base else 0.2, rel=0.02)


@pytest.mark.parametrize(
    "base",
    [
        {"q_proj.weight": ("I8", (3, 4), bytes(12))},
        {"q_proj.weight": ("F32", (4, 3), bytes(48))},
        {"k_proj.weight": ("F32", (3, 4), bytes(48))},
        {"q_proj.weight": ("F32", (3, 4), bytes(48))},
        {"q_proj.weight": floats(torch.full((3, 4), math.nan), "F32")},
    ],
    ids=["quantized", "a different shape", "no such module", "all zero", "not a number"],
)
def test_no_drift_is_claimed_of_a_base_that_cannot_be_compared(base, tmp_path):
    base = write_tensors(tmp_path / "base.safetensors", base)
    evolved = write_tensors(tmp_path / "evolved.safetensors", {"q_proj.weight": floats(torch.ones(3, 4), "F32")})
    plan = plan_port(q_proj_patch(tmp_path / "adapter", 3, 4), Update(open_checkpoint(base), open_checkpoint(evolved)))
    assert (dict(plan.evidence), plan.refusals) == ({}, ())


def test_the_plan_of_a_port_reads_samples_of_the_models_and_nothing_more(tmp_path, monkeypatch):
    values = torch.ones(100, 4000)
    models = [
        write_tensors(tmp_path / f"{name}.safetensors", {f"{n}.weight": floats(values * size, "F32") for n in modules})
        for name, size, modules in (("base", 1, ("q_proj", "x")), ("evolved", 2, ("q_proj", "x", "y")))
    ]
    patch = q_proj_patch(tmp_path / "adapter", 100, 4000)
    read = {}
    whole = os.pread

    def counting(fd, count, place):
        file = os.fstat(fd).st_ino
        read[file] = read.get(file, 0) + count
        return whole(fd, count, place)

    monkeypatch.setattr(os, "pread", counting)
    base, evolved = map(open_checkpoint, models)
    port(patch, evolved=evolved, base=base, out=tmp_path / "out")
    # A window of each tensor for the fingerprint, and one of the patched module for the drift. Of a base in float32,
    # also what its fingerprint in 16 bit would sample: as many bytes of that, twice as many of float32.
    assert read[models[1].stat().st_ino] == 3 * SAMPLE_BYTES + SAMPLE_BYTES + 3 * 2 * SAMPLE_BYTES
    assert read[models[0].stat().st_ino] == 2 * SAMPLE_BYTES + SAMPLE_BYTES


def refused(patch, tmp_path, **how):
    """What a port that must be refused says; it may leave nothing behind."""
    with pytest.raises(PlanRefusedError) as error:
        port(patch, out=tmp_path / "out", **how)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    assert list(error.value.refusals) == sorted(error.value.refusals)
    return {refusal.where: refusal.reason for refusal in error.value.refusals}


def test_an_evolved_model_of_another_width_is_refused_module_by_module(tiny, tmp_path):
    patch = capture(tiny("adapter"), tiny("base"), tmp_path / "patch")
    wider = tiny("base", inner=24)
    reasons = refused(patch, tmp_path, evolved=open_checkpoint(wider))
    modules = [f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up", "down")]
    assert sorted(reasons) == sorted(modules)
    reason = reasons["model.layers.1.mlp.up_proj"]
    assert "the delta is (out=20, in=12)" in reason
    assert "(out=24, in=12). The shapes must be equal." in reason
    assert str(wider) in reason


def test_a_shallower_evolved_model_is_refused_with_what_it_lacks(tiny, tmp_path):
    patch = capture(tiny("adapter"), tiny("base"), tmp_path / "patch")
    reasons = refused(patch, tmp_path, evolved=open_checkpoint(tiny("base", layers=1)))
    assert set(reasons) == {module for module in patch.deltas if ".1." in module}
    reason = reasons["model.layers.1.self_attn.q_proj"]
    assert "has no such module. Similar modules: model.layers.0.self_attn.q_proj." in reason


def test_a_deeper_evolved_model_is_refused_with_what_the_patch_lacks(tiny, tmp_path):
    patch = capture(tiny("adapter"), tiny("base"), tmp_path / "patch")
    reasons = refused(patch, tmp_path, evolved=open_checkpoint(tiny("base", layers=3)))
    assert set(reasons) == {module.replace(".1.", ".2.") for module in patch.deltas if ".1." in module}
    assert "adapter_config.json names it" in reasons["model.layers.2.mlp.up_proj"]


def test_a_deeper_evolved_model_is_fine_when_the_configuration_says_which_layers(tiny, tmp_path):
    adapter = tiny("adapter", layers_to_transform=[0, 1])
    patch = capture(adapter, tiny("base"), tmp_path / "patch")
    ported = port(patch, evolved=open_checkpoint(tiny("base", layers=3)), out=tmp_path / "out")
    assert set(ported.deltas) == set(patch.deltas)


def test_a_tensor_that_the_configuration_does_not_name_is_refused(tmp_path):
    folder = tmp_path / "adapter"
    patch = q_proj_patch(folder, 3, 4, name="k_proj")
    evolved = write_tensors(tmp_path / "evolved.safetensors", {"k_proj.weight": ("F32", (3, 4), bytes(48))})
    reasons = refused(patch, tmp_path, evolved=open_checkpoint(evolved), base=open_checkpoint(evolved))
    assert "but adapter_config.json does not name it, so PEFT would silently ignore them" in reasons["k_proj"]


def test_quantized_weights_are_refused(tmp_path):
    patch = q_proj_patch(tmp_path / "adapter", 3, 4)
    evolved = write_tensors(tmp_path / "evolved.safetensors", {"q_proj.weight": ("I8", (3, 4), bytes(12))})
    reasons = refused(patch, tmp_path, evolved=open_checkpoint(evolved), base=open_checkpoint(evolved))
    assert "is stored as I8; a patch can only be added to F64, F32, F16, BF16" in reasons["q_proj"]
    assert all(refusal.is_of_input for refusal in plan_port(patch, Update(None, open_checkpoint(evolved))).refusals)


def test_another_base_than_the_recorded_one_is_refused_unless_it_is_meant(tiny, tmp_path):
    patch = capture(tiny("adapter"), tiny("base"), tmp_path / "patch")
    other, evolved = open_checkpoint(tiny("base", seed=5)), open_checkpoint(tiny("evolved"))
    reasons = refused(patch, tmp_path, evolved=evolved, base=other)
    assert set(reasons) == {"--base"}
    for part in (fingerprint(other), patch.record.base.fingerprint, str(tiny("base")), "--allow-other-base"):
        assert part in reasons["--base"]
    ported = port(patch, evolved=evolved, base=other, allow_other_base=True, out=tmp_path / "meant")
    assert ported.record.ports[0].source.fingerprint == fingerprint(other)


def test_an_adapter_without_a_record_and_without_a_base_is_refused(tiny, tmp_path):
    reasons = refused(load_patch(tiny("adapter")), tmp_path, evolved=open_checkpoint(tiny("evolved")))
    assert set(reasons) == {"--base"}
    assert "has no patch.json" in reasons["--base"]
    assert "portllm capture --adapter" in reasons["--base"]


def test_all_reasons_are_given_at_once(tiny, tmp_path):
    evolved = open_checkpoint(tiny("base", inner=24, layers=1))
    reasons = refused(load_patch(tiny("adapter")), tmp_path, evolved=evolved)
    assert len(reasons) == 1 + 7 + 3
    with pytest.raises(PlanRefusedError, match="and 1 more") as error:
        port(load_patch(tiny("adapter")), evolved=evolved, out=tmp_path / "out")
    assert str(error.value).count("\n") == PlanRefusedError.SHOWN


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_of_the_head_with_the_wrong_base_is_refused(tiny, tmp_path):
    base = tiny("base", tied=False)
    patch = load_patch(tiny("adapter", of=base, target_modules=["q_proj", "lm_head"]))
    other, evolved = open_checkpoint(tiny("base", tied=False, seed=5)), open_checkpoint(tiny("evolved", of=base))
    reasons = refused(patch, tmp_path, evolved=evolved, base=other)
    assert set(reasons) == {"lm_head"}
    assert "contains a copy of its base's weight that differs from the weight of" in reasons["lm_head"]


def test_a_method_that_there_is_not_is_refused(tiny, tmp_path):
    with pytest.raises(UnknownMethodError):
        port(
            load_patch(tiny("adapter")),
            evolved=open_checkpoint(tiny("evolved")),
            method="teleport",
            out=tmp_path / "out",
        )
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_refused_and_kept(tiny, tmp_path):
    patch = capture(tiny("adapter"), tiny("base"), tmp_path / "patch")
    before = contents(tmp_path)
    evolved = open_checkpoint(tiny("evolved"))
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError):
        port(patch, evolved=evolved, out=tmp_path / "out")
    assert contents(tmp_path) == before
    ported = port(patch, evolved=evolved, out=tmp_path / "out", overwrite=True)
    assert len(ported.deltas) == 14


def test_no_port_replaces_the_patch_or_the_model_that_it_reads(tiny, tmp_path):
    patch = capture(tiny("adapter"), tiny("base"), tmp_path / "patch")
    model = tmp_path / "model"
    model.mkdir()
    evolved = open_checkpoint(write_tensors(model / "m.safetensors", {"q_proj.weight": ("F32", (3, 4), bytes(48))}))
    small = capture_adapter(q_proj_patch(tmp_path / "small", 3, 4), base=evolved, out=tmp_path / "small patch")
    before = contents(tmp_path)
    for what, out in ((small, model), (small, tmp_path / "small patch"), (small, tmp_path)):
        with pytest.raises(OutputError, match="which is an input"):
            port(what, evolved=evolved, out=out, overwrite=True)
    with pytest.raises(OutputError, match="which is an input"):
        port(patch, evolved=open_checkpoint(tiny("evolved")), out=tmp_path / "patch", overwrite=True)
    assert contents(tmp_path) == before


LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
"""Shapes of one of the 32 layers of Llama 2 7B."""


@pytest.fixture
def seven_billion(tmp_path):
    """Two checkpoints of the shape of Llama 2 7B that take no room, and an adapter of rank 16 of all its modules."""
    shapes = {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096), "model.norm.weight": (4096,)}
    factors = {}
    for layer in range(32):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": (4096,) for name in ("input_layernorm", "post_attention_layernorm")}
        for module, (d_out, d_in) in LAYER.items():
            shapes[f"{prefix}{module}.weight"] = (d_out, d_in)
            factors[f"base_model.model.{prefix}{module}.lora_A.weight"] = ("BF16", (16, d_in))
            factors[f"base_model.model.{prefix}{module}.lora_B.weight"] = ("BF16", (d_out, 16))
    for kind in ("base", "evolved"):
        folder = tmp_path / kind
        folder.mkdir()
        names = sorted(shapes)
        parts = {"model-00001-of-00002.safetensors": names[:150], "model-00002-of-00002.safetensors": names[150:]}
        for file, part in parts.items():
            write_sparse(folder / file, {name: ("F16", shapes[name]) for name in part})
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text('{"tie_word_embeddings": false}')
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    modules = [name.rsplit(".", 1)[-1] for name in LAYER]
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": modules}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    write_sparse(adapter / "adapter_model.safetensors", factors)
    return tmp_path


@pytest.mark.parametrize("with_base", [True, False])
def test_a_patch_of_a_large_model_is_ported_without_torch(with_base, seven_billion):
    if not with_base:
        capture(seven_billion / "adapter", seven_billion / "base", seven_billion / "patch")
    program = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from portllm.checkpoint.open import open_checkpoint
        from portllm.patch.adapter_folder import load_patch
        from portllm.porting.port import port
        base = open_checkpoint("base") if {with_base} else None
        patch = load_patch("adapter" if {with_base} else "patch")
        ported = port(patch, evolved=open_checkpoint("evolved"), base=base, out=Path("ported"))
        assert len(ported.deltas) == 224
        heavy = {{"torch", "transformers", "peft"}} & set(sys.modules)
        assert not heavy, heavy
    """)
    done = subprocess.run([sys.executable, "-c", program], cwd=seven_billion, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_patch(seven_billion / "ported").record.ports[0].method == "add"
    size = (seven_billion / "ported" / "adapter_model.safetensors").stat().st_size
    assert size == pytest.approx(2 * 39_976_960, rel=1e-2)


def test_the_plan_of_a_port_names_every_file_that_it_reads(tiny, tmp_path):
    base, evolved = open_checkpoint(tiny("base")), open_checkpoint(tiny("evolved", max_shard_size="3KB"))
    plan = plan_port(load_patch(tiny("adapter")), Update(base, evolved))
    assert set(plan.files) == {*base.files, *evolved.files, *files_of(plan.patch)}
    assert all(isinstance(delta.a, TensorInfo) for delta in plan.patch.deltas.values())


def test_each_patch_is_ported_as_if_alone_and_one_that_fails_stops_no_other(tiny, tmp_path):
    models = {"base": open_checkpoint(tiny("base")), "evolved": open_checkpoint(tiny("evolved"))}
    given = {tmp_path / str(seed): load_patch(tiny("adapter", seed=seed)) for seed in (1, 2)}
    unfit = load_patch(tiny("adapter", of=tiny("base", inner=24)))
    done = port_each({tmp_path / "unfit": unfit, **given}, **models)
    assert list(done) == [tmp_path / "unfit", *given]
    assert isinstance(done[tmp_path / "unfit"], PlanRefusedError)
    assert not (tmp_path / "unfit").exists()
    for out, patch in given.items():
        assert done[out].record == port(patch, **models, out=tmp_path / "alone", overwrite=True).record
        assert contents(out) == contents(tmp_path / "alone")
