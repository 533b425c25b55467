"""Plans: what would be done and why not, from headers alone."""

import json

import pytest

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.model.identity import fingerprint
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import PlanRefusedError, refuse
from portllm.matching.port_plan import plan_port
from portllm.matching.update import Update
from portllm.merging.options import MergeOptions
from portllm.merging.plan import plan_merge
from portllm.patch.adapter_folder import load_patch
from portllm.patch.identify import identify
from tests.safetensors_files import write_sparse

MODULES = [
    f"model.layers.{layer}.{name}_proj"
    for layer in (0, 1)
    for name in ("mlp.down", "mlp.gate", "mlp.up", "self_attn.k", "self_attn.o", "self_attn.q", "self_attn.v")
]


@pytest.fixture
def sparse(tmp_path):
    """Writes an adapter for `modules` and a model with `weights`, all zeros."""

    def write(modules, weights, *, config=None, tied=None, model_type="llama"):
        folder = tmp_path / "adapter"
        folder.mkdir()
        fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": list(modules), **(config or {})}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        tensors = {}
        for module, (d_out, d_in) in modules.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = ("F32", (1, d_in))
            tensors[f"base_model.model.{module}.lora_B.weight"] = ("F32", (d_out, 1))
        write_sparse(folder / "adapter_model.safetensors", tensors)
        model = tmp_path / "model"
        model.mkdir()
        write_sparse(model / "model.safetensors", weights)
        said = {} if tied is None else {"tie_word_embeddings": tied}
        if model_type is not None:
            (model / "config.json").write_text(json.dumps({"model_type": model_type, **said}))
        return load_patch(folder), open_checkpoint(model)

    return write


def test_a_plan_of_a_merge_says_what_is_written(tiny):
    into = open_checkpoint(tiny("base"))
    plan = plan_merge(load_patch(tiny("adapter")), into=into)
    assert list(plan.steps) == sorted(into.infos)
    assert sorted(name for name, step in plan.steps.items() if step.change) == [f"{name}.weight" for name in MODULES]
    assert (plan.n_changed, plan.n_bytes) == (14, into.n_bytes)
    assert [shard.file for shard in plan.shards] == ["model.safetensors"]
    assert plan.refusals == ()
    assert plan.config_changes == {}
    assert all(step.source is into.infos[name] for name, step in plan.steps.items())


def test_a_plan_is_equal_to_the_same_plan(tiny):
    patch, into = load_patch(tiny("adapter")), open_checkpoint(tiny("base"))
    assert plan_merge(patch, into=into) == plan_merge(patch, into=into)
    evolved = open_checkpoint(tiny("evolved"))
    assert plan_port(patch, Update(into, evolved)) == plan_port(patch, Update(into, evolved))


def test_a_plan_reads_no_tensor_but_for_samples(sparse, monkeypatch):
    patch, into = sparse({"q_proj": (3000, 4000)}, {"q_proj.weight": ("F32", (3000, 4000))})
    read = []
    monkeypatch.setattr("os.pread", lambda fd, count, place: read.append(count) or bytes(count))
    plan_merge(patch, into=into)
    assert sum(read) == 4096


def test_a_merge_into_another_dtype_is_planned_with_its_bytes(tiny):
    into = open_checkpoint(tiny("base"))
    plan = plan_merge(load_patch(tiny("adapter")), into=into, options=MergeOptions(dtype="F32"))
    assert plan.n_bytes == 2 * into.n_bytes
    assert plan.config_changes == {"dtype": "float32"}
    assert {step.entry.dtype for step in plan.steps.values()} == {"F32"}


def test_tensors_that_are_no_floats_keep_their_dtype(sparse):
    weights = {"q_proj.weight": ("BF16", (3, 4)), "counts": ("I64", (5,)), "norm": ("F32", (2,))}
    patch, into = sparse({"q_proj": (3, 4)}, weights)
    steps = plan_merge(patch, into=into, options=MergeOptions(dtype="F16")).steps
    assert {name: step.entry.dtype for name, step in steps.items()} == {
        "q_proj.weight": "F16",
        "counts": "I64",
        "norm": "F16",
    }


def test_the_size_of_shards_is_part_of_the_plan(tiny):
    plan = plan_merge(
        load_patch(tiny("adapter")), into=open_checkpoint(tiny("base")), options=MergeOptions(shard_bytes=2000)
    )
    assert len(plan.shards) > 2
    assert sorted(entry.name for shard in plan.shards for entry in shard.entries) == sorted(plan.steps)


def test_an_adapter_without_a_record_is_noted(tiny, tmp_path):
    base = open_checkpoint(tiny("base"))
    (note,) = plan_merge(load_patch(tiny("adapter")), into=base).notes
    assert "has no patch.json" in note
    patch = capture_adapter(load_patch(tiny("adapter")), base=base, out=tmp_path / "patch")
    assert plan_merge(patch, into=base).notes == ()


EMBEDDING = {"model.embed_tokens.weight": ("BF16", (31, 12))}


@pytest.mark.parametrize("tied", [True, None])
def test_a_tied_head_is_planned_as_a_tensor_of_its_own(tied, sparse):
    patch, into = sparse({"lm_head": (31, 12)}, EMBEDDING, tied=tied)
    plan = plan_merge(patch, into=into)
    assert plan.refusals == ()
    assert plan.config_changes == {"tie_word_embeddings": False}
    assert set(plan.steps) == {"model.embed_tokens.weight", "lm_head.weight"}
    step = plan.steps["lm_head.weight"]
    assert step.source.name == "model.embed_tokens.weight"
    assert step.change is not None
    assert plan.steps["model.embed_tokens.weight"].change is None
    assert any("a separate head" in note for note in plan.notes)


@pytest.mark.parametrize("model_type", [None, "foreign"])
def test_head_and_embedding_of_a_model_of_an_unknown_type_are_refused_and_its_linear_modules_are_not(
    model_type, sparse
):
    modules = {"lm_head": (31, 12), "h.0.q_proj": (12, 12)}
    weights = {**EMBEDDING, "lm_head.weight": ("BF16", (31, 12)), "h.0.q_proj.weight": ("BF16", (12, 12))}
    patch, into = sparse(modules, weights, tied=False, model_type=model_type)
    (refusal,) = plan_merge(patch, into=into).refusals
    assert refusal.where == "lm_head"
    assert ("is not known here" if model_type else "names no model type") in refusal.reason


def test_a_head_of_its_own_is_planned_as_any_other_module(sparse):
    patch, into = sparse({"lm_head": (31, 12)}, {**EMBEDDING, "lm_head.weight": ("BF16", (31, 12))}, tied=False)
    plan = plan_merge(patch, into=into)
    assert (plan.config_changes, plan.n_changed) == ({}, 1)
    assert plan.steps["lm_head.weight"].source.name == "lm_head.weight"


@pytest.mark.parametrize(("shape", "said"), [((12,), r"(12,)"), ((3, 4, 1), "(3, 4, 1)")])
def test_a_weight_that_is_no_matrix_takes_no_delta(shape, said, sparse):
    patch, into = sparse({"norm": (3, 4)}, {"norm.weight": ("F32", shape)})
    (refusal,) = plan_merge(patch, into=into).refusals
    assert refusal.where == "norm"
    assert f"the delta is (out=3, in=4), but its weight in {into.name} is {said}." in refusal.reason


def test_a_module_under_another_prefix_gets_a_hint(sparse):
    weights = {f"model.language_model.layers.{n}.mlp.up_proj.weight": ("F32", (3, 4)) for n in (0, 1)}
    patch, into = sparse({"model.layers.0.mlp.up_proj": (3, 4)}, weights)
    refusals = {refusal.where: refusal.reason for refusal in plan_merge(patch, into=into).refusals}
    assert set(refusals) == {"model.layers.0.mlp.up_proj"}
    hint = "Similar modules: model.language_model.layers.0.mlp.up_proj and 1 more."
    assert hint in refusals["model.layers.0.mlp.up_proj"]


def test_refusals_are_sorted_and_raised_together(sparse):
    modules = dict.fromkeys(("c", "a", "b"), (3, 4))
    patch, into = sparse(modules, {"b.weight": ("F32", (4, 3)), "c.weight": ("I8", (3, 4))})
    plan = plan_merge(patch, into=into)
    assert [refusal.where for refusal in plan.refusals] == ["a", "b", "c"]
    with pytest.raises(PlanRefusedError) as error:
        refuse(plan.refusals)
    assert error.value.refusals == plan.refusals


def test_a_model_is_identified_by_name_and_fingerprint(tiny):
    base = open_checkpoint(tiny("base"))
    identity = identify(base)
    assert (identity.name, identity.fingerprint, identity.digest) == (str(tiny("base")), fingerprint(base), None)
