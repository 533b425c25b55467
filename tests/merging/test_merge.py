"""Merging: bytes that no block, layout or second run changes, what is refused, and tied heads."""

import json
import math
import shutil

import pytest
import torch

import portllm
from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.model.identity import digest, fingerprint
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import (
    DeviceError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    PlanRefusedError,
    UnsupportedDtypeError,
)
from portllm.files import page_cache
from portllm.merging import blocks as merging
from portllm.merging import tensor as make_tensor
from portllm.merging.merge import merge
from portllm.merging.options import MergeOptions
from portllm.merging.rounding_modes import Nearest, Stochastic
from portllm.patch.adapter_folder import load_patch
from portllm.tensors.bytes import read_bytes
from portllm.tensors.tensors import TORCH_DTYPES, encode, load
from tests.safetensors_files import contents, write_tensors

MEASURE_TOLERANCE = 1e-5  # the sums of a block are taken in float32, see measure_merge

ignore_head_warnings = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`", "ignore:.*tied.*"
)


def draw(*shape, seed, size=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def stored(tensor, dtype):
    return dtype, tuple(tensor.shape), bytes(encode(tensor.to(TORCH_DTYPES[dtype])))


def write_adapter(folder, factors, *, alpha=3, **config):
    """An adapter folder with factors `{module: (a, b)}` in float32."""
    folder.mkdir()
    (rank,) = {a.shape[0] for a, _ in factors.values()}
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(factors), **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = stored(a, "F32")
        tensors[f"base_model.model.{module}.lora_B.weight"] = stored(b, "F32")
    write_tensors(folder / "adapter_model.safetensors", tensors)
    return load_patch(folder)


@pytest.fixture
def case(tmp_path):
    """A single-file model of one patched matrix and one other tensor, and its patch."""

    def make(*, shape=(20, 12), dtype="BF16", size=1.0, rank=3, delta=0.1, name="case", weight=None, **more):
        folder = tmp_path / name
        folder.mkdir()
        d_out, d_in = shape
        weight = draw(d_out, d_in, seed=1, size=size) if weight is None else weight
        tensors = {"h.q_proj.weight": stored(weight, dtype), "norm": stored(draw(7, seed=2), dtype), **more}
        model = write_tensors(folder / "base.safetensors", tensors)
        factors = {"h.q_proj": (draw(rank, d_in, seed=3), draw(d_out, rank, seed=4, size=delta))}
        return write_adapter(folder / "adapter", factors), open_checkpoint(model)

    return make


def values(checkpoint):
    return {name: load(info) for name, info in checkpoint.infos.items()}


def exact(patch, into):
    """The merged weight of the case, in float64."""
    (delta,) = patch.deltas.values()
    product = load(delta.b).double() @ load(delta.a).double()
    return load(into.infos["h.q_proj.weight"]).double() + delta.scale * product


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name != "case"]


# ---- what is written


@pytest.mark.parametrize(
    ("shape", "elements"),
    [
        ((400, 64), 64 * 64),  # 6 blocks of 64 rows and one of 16
        ((130, 96), 96 * 64),  # a remainder of 2 rows
        ((129, 96), 96 * 64),  # a remainder of 1 row
        ((64, 200), 200 * 16),  # no remainder
        ((50, 33), 33 * 17),  # widths that fill no register
    ],
)
@pytest.mark.parametrize(("dtype", "rounding"), [("BF16", Nearest()), ("F32", Nearest()), ("BF16", Stochastic(7))])
def test_the_size_of_blocks_changes_no_byte(shape, elements, dtype, rounding, case, tmp_path, monkeypatch):
    patch, into = case(shape=shape, dtype=dtype, rank=8)
    whole = merge(patch, into=into, out=tmp_path / "whole", options=MergeOptions(rounding=rounding))
    monkeypatch.setattr(merging, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(merging, "COPY_BYTES", 5)
    blocks = merge(patch, into=into, out=tmp_path / "blocks", options=MergeOptions(rounding=rounding))
    name = "model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "blocks" / name).read_bytes()
    assert blocks.total.kept_gain == pytest.approx(whole.total.kept_gain, rel=MEASURE_TOLERANCE)
    assert blocks.total.rounding_loss == pytest.approx(whole.total.rounding_loss, rel=MEASURE_TOLERANCE)
    assert (blocks.into, blocks.output.digest) == (whole.into, whole.output.digest)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_byte(threads, tiny, tmp_path, monkeypatch):
    adapter = load_patch(tiny("adapter"))
    expected = merge(
        adapter, into=open_checkpoint(tiny("base")), out=tmp_path / "a" / "out", options=MergeOptions(shard_bytes=2000)
    )
    monkeypatch.setattr(make_tensor, "default_threads", lambda: threads)
    report = merge(
        adapter, into=open_checkpoint(tiny("base")), out=tmp_path / "b" / "out", options=MergeOptions(shard_bytes=2000)
    )
    assert report == expected
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_model_that_is_large_for_the_machine_is_written_all_the_same(tiny, tmp_path, monkeypatch):
    adapter = load_patch(tiny("adapter"))
    for name, share in (("a", 1.0), ("b", 0.0)):
        monkeypatch.setattr(page_cache, "LARGE_SHARE", share)
        monkeypatch.setattr(page_cache, "STEP_BYTES", 1000)
        merge(adapter, into=open_checkpoint(tiny("base")), out=tmp_path / name / "out")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(case, tmp_path):
    patch, into = case()
    with pytest.raises(DeviceError, match="--device cuda: torch finds no such device"):
        merge(patch, into=into, out=tmp_path / "out", options=MergeOptions(device="cuda"))
    assert leftovers(tmp_path) == []


def test_the_manifest_says_where_the_sums_were_computed(case, tmp_path):
    patch, into = case()
    merge(patch, into=into, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "portllm.json").read_text())["device"] == "cpu"


@pytest.mark.parametrize(("shape", "rows"), [((400, 64), 64), ((130, 96), 64), ((555, 33), 17)])
def test_the_size_of_blocks_changes_no_byte_of_a_transposed_weight(shape, rows, tmp_path, monkeypatch):
    d_in, d_out = shape
    tensors = {"h.c_attn.weight": stored(draw(d_in, d_out, seed=1), "F32")}
    into = open_checkpoint(write_tensors(tmp_path / "base.safetensors", tensors))
    a, b = draw(8, d_in, seed=3), draw(d_out, 8, seed=4)
    patch = write_adapter(tmp_path / "adapter", {"h.c_attn": (a, b)}, alpha=8, fan_in_fan_out=True)
    merge(patch, into=into, out=tmp_path / "whole")
    monkeypatch.setattr(merging, "BLOCK_ELEMENTS", rows * d_out)
    merge(patch, into=into, out=tmp_path / "blocks")
    found = [values(open_checkpoint(tmp_path / name))["h.c_attn.weight"] for name in ("whole", "blocks")]
    assert found[0].equal(found[1])
    assert found[0].equal(draw(d_in, d_out, seed=1) + (b @ a).T)


def test_the_remainder_of_a_block_is_added_to_its_own_rows(case, tmp_path, monkeypatch):
    patch, into = case(shape=(41, 12), dtype="F32")
    monkeypatch.setattr(merging, "BLOCK_ELEMENTS", 12 * 16)
    merge(patch, into=into, out=tmp_path / "out")
    merged = values(open_checkpoint(tmp_path / "out"))["h.q_proj.weight"]
    assert (merged.double() - exact(patch, into)).abs().max() < 1e-5


@pytest.mark.parametrize("stored_as", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", [None, "F64", "F32", "F16", "BF16"])
def test_weights_are_stored_in_the_dtype_that_is_asked_for(stored_as, dtype, case, tmp_path):
    patch, into = case(dtype=stored_as, counter=("I64", (2,), bytes(16)), scalar=stored(torch.tensor(1.5), stored_as))
    report = merge(patch, into=into, out=tmp_path / "out", options=MergeOptions(dtype=dtype))
    found, before = values(open_checkpoint(tmp_path / "out")), values(into)
    kind = TORCH_DTYPES[dtype or stored_as]
    (delta,) = patch.deltas.values()
    change = (load(delta.b) @ load(delta.a)) * delta.scale
    assert found["h.q_proj.weight"].equal((before["h.q_proj.weight"].float() + change).to(kind))
    assert found["norm"].equal(before["norm"].to(kind))
    assert found["scalar"].equal(before["scalar"].to(kind))
    assert found["counter"].equal(before["counter"])
    assert report.dtype == (dtype or stored_as,)
    assert report.into.digest == digest(into)
    assert report.output.digest == digest(open_checkpoint(tmp_path / "out"))


def test_the_configuration_names_the_new_dtype(tiny, tmp_path):
    from transformers import LlamaForCausalLM

    merge(
        load_patch(tiny("adapter")),
        into=open_checkpoint(tiny("base")),
        out=tmp_path / "out",
        options=MergeOptions(dtype="F32"),
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float32


def test_a_dtype_that_weights_are_not_stored_in_is_refused(case, tmp_path):
    patch, into = case()
    for dtype in ("I8", "float8_e4m3fn", "F8_E4M3", "", "F"):
        with pytest.raises(UnsupportedDtypeError, match=f"dtype '{dtype}'; expected one of F64, F32, F16, BF16"):
            merge(patch, into=into, out=tmp_path / "out", options=MergeOptions(dtype=dtype))
    assert leftovers(tmp_path) == []


def test_the_measures_of_a_merge_are_those_of_float64(case, tmp_path):
    patch, into = case(delta=0.002)
    report = merge(patch, into=into, out=tmp_path / "out")
    before, after = (values(model)["h.q_proj.weight"].double() for model in (into, open_checkpoint(tmp_path / "out")))
    delta = exact(patch, into) - before
    change = after - before
    gain = ((change * delta).sum() / delta.square().sum()).item()
    loss = ((change - delta).norm() / delta.norm()).item()
    assert report.total.kept_gain == pytest.approx(gain, rel=1e-4)
    assert report.total.rounding_loss == pytest.approx(loss, rel=1e-4)
    assert loss > 0.1
    assert report.worst == "h.q_proj.weight"
    assert (report.n_copied, len(report.tensors)) == (1, 1)


@pytest.mark.parametrize("shards", ["one", "many"])
def test_a_second_run_writes_the_same_bytes_and_leaves_the_inputs_as_they_were(shards, tiny, tmp_path):
    base = tiny("base", max_shard_size="3KB")
    patch = capture_adapter(load_patch(tiny("adapter")), base=open_checkpoint(base), out=tmp_path / "patch")
    inputs = {**contents(base), **contents(tmp_path / "patch")}
    shard_bytes = 2000 if shards == "many" else 10**9
    for name in ("a", "b"):
        into = open_checkpoint(base)
        merge(patch, into=into, out=tmp_path / name / "merged", options=MergeOptions(shard_bytes=shard_bytes))
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert first == second
    assert (len([name for name in first if name.endswith(".safetensors")]) > 2) == (shards == "many")
    assert {**contents(base), **contents(tmp_path / "patch")} == inputs


def test_the_layout_of_the_input_changes_no_tensor(tiny, tmp_path):
    patch = load_patch(tiny("adapter"))
    one, many = (open_checkpoint(tiny("base", **how)) for how in ({}, {"max_shard_size": "3KB"}))
    first = merge(patch, into=one, out=tmp_path / "one")
    second = merge(patch, into=many, out=tmp_path / "many")
    assert first.output.digest == second.output.digest
    assert contents(tmp_path / "one")["model.safetensors"] == contents(tmp_path / "many")["model.safetensors"]


def test_what_the_patch_does_not_touch_is_copied(tiny, tmp_path):
    patch = load_patch(tiny("adapter", target_modules=["q_proj"]))
    into = open_checkpoint(tiny("base"))
    report = merge(patch, into=into, out=tmp_path / "out")
    merged = open_checkpoint(tmp_path / "out")
    assert set(merged.infos) == set(into.infos)
    changed = {name for name in into.infos if read_bytes(into.infos[name]) != read_bytes(merged.infos[name])}
    assert changed == set(report.tensors) == {f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)}


def test_shards_are_loaded_by_transformers(tiny, tmp_path):
    from transformers import LlamaForCausalLM

    from tests.models import load_tuned, logits

    base, adapter = tiny("base", dtype=torch.float32), tiny("adapter")
    merge(load_patch(adapter), into=open_checkpoint(base), out=tmp_path / "out", options=MergeOptions(shard_bytes=4000))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    expected = logits(load_tuned(base, adapter))
    assert (logits(merged) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_a_single_file_without_configuration_becomes_a_folder_with_weights_manifest_and_card(case, tmp_path):
    patch, into = case()
    merge(patch, into=into, out=tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"README.md", "model.safetensors", "portllm.json"}


def test_progress_ends_when_all_bytes_are_written(case, tmp_path):
    patch, into = case()
    told = []
    report = merge(patch, into=into, out=tmp_path / "out", progress=lambda *now: told.append(now))
    assert told[-1] == ("merge", report.n_bytes, report.n_bytes, "bytes")
    assert report.n_bytes == 2 * (20 * 12 + 7)


def test_the_digests_of_input_and_output_are_known_afterwards(tiny, tmp_path, monkeypatch):
    base = tiny("base", max_shard_size="3KB", seed=3)
    report = merge(
        load_patch(tiny("adapter")),
        into=open_checkpoint(base),
        out=tmp_path / "out",
        options=MergeOptions(shard_bytes=4000),
    )

    def refuse(*_):
        raise AssertionError("a tensor was read again")

    monkeypatch.setattr("portllm.checkpoint.model.identity.digest_tensor", refuse)
    assert digest(open_checkpoint(base)) == report.into.digest
    assert digest(open_checkpoint(tmp_path / "out")) == report.output.digest


# ---- stochastic rounding


def test_stochastic_rounding_keeps_a_gain_that_nearest_rounding_loses(case, tmp_path):
    patch, into = case(shape=(200, 300), weight=torch.ones(200, 300), delta=2e-5)
    nearest = merge(patch, into=into, out=tmp_path / "nearest")
    chance = merge(patch, into=into, out=tmp_path / "chance", options=MergeOptions(rounding=Stochastic(1)))
    assert nearest.total.kept_gain < 0.01
    # The gain's standard error is about the step over the size of the delta, over the root of the number of elements.
    error = chance.total.rounding_loss / math.sqrt(200 * 300)
    assert chance.total.kept_gain == pytest.approx(1.0, abs=5 * error)
    assert chance.rounding == "stochastic-seed1"


def test_stochastic_rounding_depends_on_its_seed_alone(case, tmp_path):
    patch, into = case(delta=0.001)
    found = []
    for number, seed in enumerate((1, 1, 2)):
        merge(patch, into=into, out=tmp_path / str(number), options=MergeOptions(rounding=Stochastic(seed)))
        found.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(("stored_as", "dtype"), [("F16", None), ("F32", None), ("BF16", "F32")])
def test_stochastic_rounding_to_another_dtype_is_refused(stored_as, dtype, case, tmp_path):
    patch, into = case(dtype=stored_as)
    with pytest.raises(UnsupportedDtypeError, match=r"'h.q_proj.weight': .* stochastic rounding only supports BF16"):
        merge(patch, into=into, out=tmp_path / "out", options=MergeOptions(dtype=dtype, rounding=Stochastic()))
    assert leftovers(tmp_path) == []


# ---- what is refused


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["weight", "A", "B"])
def test_a_value_that_is_not_finite_is_refused_by_its_tensor(value, where, tmp_path):
    weight, a, b = draw(20, 12, seed=1), draw(3, 12, seed=2), draw(20, 3, seed=3)
    {"weight": weight, "A": a, "B": b}[where][1, 2] = value
    patch = write_adapter(tmp_path / "adapter", {"q": (a, b)})
    into = open_checkpoint(write_tensors(tmp_path / "m.safetensors", {"q.weight": stored(weight, "BF16")}))
    before = contents(tmp_path)
    with pytest.raises(NonFiniteError, match=r"'q.weight': rows \d+ to \d+ contain an infinity or NaN"):
        merge(patch, into=into, out=tmp_path / "out")
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_sum_that_does_not_fit_into_float16_is_refused(case, tmp_path):
    weight = torch.zeros(20, 12)
    weight[19] = 65500.0
    patch, into = case(dtype="F16", weight=weight, delta=1000.0)
    with pytest.raises(NonFiniteError, match="after the cast to F16"):
        merge(patch, into=into, out=tmp_path / "out")
    assert leftovers(tmp_path) == []
    merge(patch, into=into, out=tmp_path / "out", options=MergeOptions(dtype="F32"))


def test_an_untouched_value_that_does_not_fit_into_the_new_dtype_is_refused(case, tmp_path):
    patch, into = case(dtype="F32", big=stored(torch.tensor([1.0, 1e6]), "F32"))
    with pytest.raises(NonFiniteError, match="'big': rows 0 to 2 contain a value that overflows F16"):
        merge(patch, into=into, out=tmp_path / "out", options=MergeOptions(dtype="F16"))
    assert leftovers(tmp_path) == []


def test_an_untouched_infinity_stays_one(case, tmp_path):
    mask = torch.tensor([0.0, -math.inf])
    patch, into = case(dtype="F32", mask=stored(mask, "F32"))
    merge(patch, into=into, out=tmp_path / "out", options=MergeOptions(dtype="F16"))
    assert values(open_checkpoint(tmp_path / "out"))["mask"].float().equal(mask)


def test_a_patch_of_another_base_is_refused_unless_it_is_meant(tiny, tmp_path):
    patch = capture_adapter(load_patch(tiny("adapter")), base=open_checkpoint(tiny("base")), out=tmp_path / "patch")
    evolved = open_checkpoint(tiny("evolved"))
    with pytest.raises(PlanRefusedError) as error:
        merge(patch, into=evolved, out=tmp_path / "out")
    (refusal,) = error.value.refusals
    assert refusal.where == "--into"
    assert fingerprint(evolved) in refusal.reason
    assert leftovers(tmp_path) == ["patch"]
    merge(patch, into=evolved, out=tmp_path / "out", options=MergeOptions(allow_other_base=True))


def test_a_patch_that_does_not_fit_is_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(PlanRefusedError) as error:
        merge(load_patch(tiny("adapter")), into=open_checkpoint(tiny("base", inner=24)), out=tmp_path / "out")
    assert len(error.value.refusals) == 6
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_refused_and_kept(case, tmp_path):
    patch, into = case()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "patch.json").write_text("x")
    before = contents(tmp_path)
    with pytest.raises(OutputExistsError):
        merge(patch, into=into, out=tmp_path / "out")
    assert contents(tmp_path) == before
    merge(patch, into=into, out=tmp_path / "out", overwrite=True)
    assert set(contents(tmp_path / "out")) == {"README.md", "model.safetensors", "portllm.json"}


def test_no_merge_replaces_what_it_reads(case, tiny, tmp_path):
    patch, into = case()
    before = contents(tmp_path)
    for out, reason in (
        ("case", "was not written by this program"),
        ("case/adapter", "which is an input"),
        ("", "was not written by this program"),
    ):
        with pytest.raises(OutputError, match=reason):
            merge(patch, into=into, out=tmp_path / out, overwrite=True)
    folder = open_checkpoint(tiny("base"))
    with pytest.raises(OutputError, match="which is an input"):
        merge(load_patch(tiny("adapter")), into=folder, out=tiny("base"), overwrite=True)
    assert contents(tmp_path) == before


def test_a_model_that_shrinks_meanwhile_leaves_nothing_behind(case, tmp_path):
    patch, into = case()
    (file,) = into.files
    file.path.write_bytes(file.path.read_bytes()[:-1])
    with pytest.raises(portllm.PortLLMError, match="changed while it was being read"):
        merge(patch, into=into, out=tmp_path / "out")
    assert leftovers(tmp_path) == []


# ---- tied heads


@pytest.fixture
def head_patch(tiny):
    """An adapter of the head and one other module, of a float32 model with a tied head."""
    base = tiny("base", dtype=torch.float32)
    return tiny("adapter", of=base, target_modules=["q_proj", "lm_head"]), base


@ignore_head_warnings
def test_a_patch_of_a_tied_head_gives_the_output_a_head_of_its_own(head_patch, tmp_path):
    from transformers import LlamaForCausalLM

    from tests.models import load_tuned, logits

    adapter, base = head_patch
    into = open_checkpoint(base)
    merge(load_patch(adapter), into=into, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    merged = open_checkpoint(tmp_path / "out")
    name = "model.embed_tokens.weight"
    assert set(merged.infos) == {*into.infos, "lm_head.weight"}
    assert read_bytes(merged.infos[name]) == read_bytes(into.infos[name])
    assert read_bytes(merged.infos["lm_head.weight"]) != read_bytes(into.infos[name])

    # Not PEFT's own merge, which puts the head's delta into the embedding too: its model before merging.
    expected = logits(load_tuned(base, adapter))
    found = logits(LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"))
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@ignore_head_warnings
def test_a_tied_head_that_is_stored_twice_gives_the_same_output(head_patch, tmp_path):
    adapter, base = head_patch
    into = open_checkpoint(base)
    twice = tmp_path / "twice"
    twice.mkdir()
    (twice / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = {name: (info.dtype, info.shape, read_bytes(info)) for name, info in into.infos.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_tensors(twice / "model.safetensors", tensors)

    first = merge(load_patch(adapter), into=into, out=tmp_path / "first")
    second = merge(load_patch(adapter), into=open_checkpoint(twice), out=tmp_path / "second")
    assert first.output.digest == second.output.digest
    assert first.into.digest == second.into.digest == digest(open_checkpoint(twice))
    name = "model.safetensors"
    assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@ignore_head_warnings
@pytest.mark.parametrize("captured", [False, True])
def test_a_patch_of_a_head_of_its_own_merges_as_in_peft(captured, tiny, tmp_path):
    from tests.models import merge_with_peft

    base = tiny("base", tied=False)
    adapter = tiny("adapter", of=base, target_modules=["q_proj", "lm_head"])
    patch = load_patch(adapter)
    if captured:
        patch = capture_adapter(patch, base=open_checkpoint(base), out=tmp_path / "patch")
    merge(patch, into=open_checkpoint(base), out=tmp_path / "ours")
    theirs = open_checkpoint(merge_with_peft(base, adapter, tmp_path / "peft"))
    ours = open_checkpoint(tmp_path / "ours")
    assert set(ours.infos) == set(theirs.infos)
    assert all(read_bytes(ours.infos[name]) == read_bytes(theirs.infos[name]) for name in ours.infos)
    assert read_bytes(ours.infos["lm_head.weight"]) != read_bytes(open_checkpoint(base).infos["lm_head.weight"])


@ignore_head_warnings
def test_a_patch_of_the_head_with_the_copy_of_another_base_is_refused(tiny, tmp_path):
    base = tiny("base", tied=False)
    patch = load_patch(tiny("adapter", of=base, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(PlanRefusedError, match="lm_head: the adapter contains a copy of its base's weight") as error:
        merge(patch, into=open_checkpoint(tiny("base", tied=False, seed=5)), out=tmp_path / "out")
    assert len(error.value.refusals) == 1
    assert list(tmp_path.iterdir()) == []


@ignore_head_warnings
def test_a_float32_copy_of_a_tied_head_is_set_apart_in_float32(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(tiny("base"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = load_patch(tiny("adapter", of=tiny("base"), target_modules=["q_proj", "lm_head"]))
    merge(adapter, into=open_checkpoint(base), out=tmp_path / "merged")
    head = load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"]
    delta = adapter.deltas["lm_head"]
    assert head.dtype == torch.float32
    assert torch.allclose(head, tensors["lm_head.weight"] + delta.scale * load(delta.b) @ load(delta.a), atol=1e-5)
