"""Patches from two checkpoints: what PEFT makes of them, what is left out, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import portllm
from portllm.capturing.tuned import capture_tuned
from portllm.capturing.tuned_plan import plan_capture_tuned
from portllm.errors import NonFiniteError, OutputError, OutputExistsError, PlanRefusedError
from portllm.patch.adapter_folder import read_record
from portllm.tensors.bytes import read_bytes
from portllm.tensors.rows import RowReader
from tests.safetensors_files import contents

LOGIT_TOLERANCE = 1e-4
FULL_RANK = 20


def opened(*folders):
    return [portllm.open_checkpoint(folder) for folder in folders]


def captured(base, tuned, out, **how):
    return capture_tuned(*opened(base, tuned), out=out, **how)


def logits_of(folder):
    from transformers import LlamaForCausalLM

    from tests import models

    return models.logits(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def logits_with_peft(base, patch):
    from tests import models

    return models.logits(models.load_tuned(base, patch, dtype=torch.float32))


def copy_with(folder, source, change):
    """A copy of a single-file checkpoint whose tensors went through `change`."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def moved(*names, by=0.25):
    def change(tensors):
        assert set(names) <= set(tensors)
        return {name: value + by if name in names else value for name, value in tensors.items()}

    return change


Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention_bias", [True, False])
def test_peft_makes_the_tuned_model_of_base_and_patch(tiny, tmp_path, tied, attention_bias):
    base = tiny("base", tied=tied, attention_bias=attention_bias)
    tuned = tiny("evolved", of=base, drift=0.05)
    report = captured(base, tuned, tmp_path / "patch", rank=FULL_RANK)
    expected = logits_of(tuned)
    assert (logits_of(base) - expected).abs().max() > 0.1
    assert (logits_with_peft(base, tmp_path / "patch") - expected).abs().max() < LOGIT_TOLERANCE
    assert report.left_out == {}
    assert report.truncation_residual < 1e-5


@pytest.mark.parametrize("changed", [[Q, NORM], [Q, EMBEDDING], [Q, "model.norm.weight"], [Q]])
def test_peft_makes_the_tuned_model_of_single_changes(tiny, tmp_path, changed):
    base = tiny("base", dtype=torch.float32)
    tuned = copy_with(tmp_path / "tuned", base, moved(*changed))
    report = captured(base, tuned, tmp_path / "patch", rank=FULL_RANK)
    assert (logits_with_peft(base, tmp_path / "patch") - logits_of(tuned)).abs().max() < LOGIT_TOLERANCE
    assert sorted([*(f"{module}.weight" for module in report.deltas), *report.values]) == sorted(changed)
    assert report.deltas[Q.removesuffix(".weight")].rank == 1


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # peft, of a head that is saved apart
def test_a_head_that_tuning_untied_is_kept(tiny, tmp_path):
    base = tiny("base", dtype=torch.float32)
    tuned = copy_with(
        tmp_path / "tuned", base, lambda t: {**moved(Q)(t), "lm_head.weight": t[EMBEDDING].flip(0).contiguous()}
    )
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    captured(base, tuned, tmp_path / "patch", rank=FULL_RANK)
    assert (logits_with_peft(base, tmp_path / "patch") - logits_of(tuned)).abs().max() < LOGIT_TOLERANCE


def test_dropped_and_merged_again_the_linear_weights_are_those_of_tuned(tiny, tmp_path):
    base = tiny("base", dtype=torch.float32)
    tuned = tiny("evolved", of=base, drift=0.05)
    report = captured(base, tuned, tmp_path / "patch", rank=FULL_RANK, dense="drop")
    patch = portllm.load_patch(tmp_path / "patch")
    ported = portllm.port(patch, evolved=portllm.open_checkpoint(base), out=tmp_path / "ported")
    portllm.merge(ported, into=portllm.open_checkpoint(base), out=tmp_path / "merged")
    merged, expected, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", tuned, base)
    )
    assert set(report.left_out) == {name for name in expected if "norm" in name or "embed" in name}
    for name, value in expected.items():
        assert torch.allclose(merged[name], before[name] if name in report.left_out else value, atol=1e-6), name


def test_what_is_left_out_is_counted_in_the_patch(tiny, tmp_path):
    base = tiny("base", dtype=torch.float32)
    tuned = copy_with(tmp_path / "tuned", base, moved(Q, NORM))
    captured(base, tuned, tmp_path / "patch", rank=1, dense="drop")
    settings = read_record(tmp_path / "patch").capture.settings
    weight = load_file(base / "model.safetensors")[NORM]
    expected = (0.25 * len(weight) ** 0.5) / weight.norm().item()
    assert settings["left_out"] == {NORM: pytest.approx(expected, rel=1e-4)}
    assert (settings["rank"], settings["dense"]) == (1, "drop")


def test_the_record_names_both_models_by_all_their_bytes(tiny, tmp_path):
    base, tuned = tiny("base"), tiny("evolved", drift=0.05)
    captured(base, tuned, tmp_path / "patch", rank=2)
    record = read_record(tmp_path / "patch")
    assert record.base.digest == portllm.inspect(base, with_digest=True).digest
    assert record.capture.settings["tuned"]["digest"] == portllm.inspect(tuned, with_digest=True).digest
    assert record.capture.method == "tuned"


def test_a_change_below_the_rounding_noise_is_left_out(tiny, tmp_path):
    base = tiny("base")
    tuned = copy_with(
        tmp_path / "tuned",
        base,
        lambda t: {
            **moved(Q)(t),
            "model.layers.1.mlp.up_proj.weight": torch.nextafter(
                t["model.layers.1.mlp.up_proj.weight"], torch.tensor(9.0, dtype=torch.bfloat16)
            ).where(
                torch.rand(20, 12, generator=torch.Generator().manual_seed(0)) < 0.2,
                t["model.layers.1.mlp.up_proj.weight"],
            ),
        },
    )
    report = captured(base, tuned, tmp_path / "patch")
    assert set(report.deltas) == {"model.layers.0.self_attn.q_proj"}
    assert set(report.left_out) == {"model.layers.1.mlp.up_proj.weight"}


def test_the_patch_is_the_same_bytes_twice_and_for_any_shards_and_threads(tiny, tmp_path):
    from tests import models

    base = tiny("base", dtype=torch.float32)
    tuned = tiny("evolved", of=base, drift=0.05)
    captured(base, tuned, tmp_path / "first")
    torch.set_num_threads(2)
    try:
        captured(base, tuned, tmp_path / "second")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    split_base = tiny("base", dtype=torch.float32, max_shard_size=models.SEVERAL_SHARDS)
    split_tuned = tiny("evolved", of=split_base, drift=0.05, max_shard_size=models.SEVERAL_SHARDS)
    captured(split_base, split_tuned, tmp_path / "third")
    first, second, third = (contents(tmp_path / name) for name in ("first", "second", "third"))
    assert first == second
    assert first["adapter_model.safetensors"] == third["adapter_model.safetensors"]


WIDE = {f"model.layers.{number}.mlp.up_proj.weight": (150 + 10 * number, 130) for number in range(6)}
"""Weights that are large enough for the randomized decomposition."""


def write_wide(folder, *, seed, base=None, size=0.02):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in WIDE.items()}
    if base is not None:
        before = load_file(base / "model.safetensors")
        low = {name: torch.randn(len(value), 3, generator=generator) for name, value in tensors.items()}
        tensors = {name: before[name] + size * low[name] @ value[:3] for name, value in tensors.items()}
    folder.mkdir()
    save_file({name: value.bfloat16() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("rank", [4, None])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, rank):
    base = write_wide(tmp_path / "base", seed=0)
    tuned = write_wide(tmp_path / "tuned", seed=1, base=base)
    before = torch.get_num_threads()
    try:
        for workers in (1, 2, 4):
            torch.set_num_threads(workers)
            captured(base, tuned, tmp_path / str(workers), rank=rank)
            assert torch.get_num_threads() == workers
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "4")


def test_every_byte_is_read_once_and_what_is_known_to_be_equal_not_again(tiny, tmp_path, monkeypatch):
    base = copy_with(tmp_path / "base", tiny("base", dtype=torch.float32), dict)
    tuned = copy_with(tmp_path / "tuned", base, moved(Q))
    monkeypatch.setenv("PORTLLM_CACHE", str(tmp_path / "cache"))
    models = opened(base, tuned)
    n_read = []

    def counted(read):
        def count(*where):
            data = read(*where)
            infos = [one for one in where if hasattr(one, "file")]
            n_read.append(len(data) if any(infos[0].file in model.files for model in models) else 0)
            return data

        return count

    monkeypatch.setattr(RowReader, "span", counted(RowReader.span))
    for module in ("tensors.tensors", "checkpoint.model.identity"):
        monkeypatch.setattr(f"portllm.{module}.read_bytes", counted(read_bytes))
    capture_tuned(*models, out=tmp_path / "first", rank=1)
    assert sum(n_read) == sum(model.n_bytes for model in models)
    n_read.clear()
    capture_tuned(*models, out=tmp_path / "second", rank=1)
    assert sum(n_read) == sum(model.info(Q).n_bytes for model in models)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_what_is_left_out_by_a_given_rank_is_not_called_noise(tiny, tmp_path):
    base, tuned = tiny("base"), tiny("evolved", drift=0.05)
    given, found = captured(base, tuned, tmp_path / "given", rank=2), captured(base, tuned, tmp_path / "found")
    assert {delta.noise_edge for delta in given.deltas.values()} == {None}
    assert all(delta.noise_edge > 0 for delta in found.deltas.values())
    assert "noise" in found.record.capture.settings
    assert "noise" not in given.record.capture.settings


def test_values_that_are_stored_in_another_dtype_are_no_change(tiny, tmp_path):
    base = copy_with(tmp_path / "base", tiny("base", dtype=torch.bfloat16), dict)
    tuned = copy_with(
        tmp_path / "tuned", base, lambda t: {n: v.float() + (0.25 if n == Q else 0) for n, v in t.items()}
    )
    report = captured(base, tuned, tmp_path / "patch", rank=1)
    assert report.n_unchanged == len(portllm.open_checkpoint(base).infos) - 1
    assert report.left_out == {}


@pytest.mark.parametrize(
    ("there", "problem"),
    [(slice(0, 0), None), (slice(0, 1), "stores it as I64"), (slice(5000, 5001), "the whole tensors differ")],
)
def test_whole_numbers_that_are_equal_in_both_models_are_no_change(tiny, tmp_path, there, problem):
    positions = torch.arange(200_000)
    other = positions.clone()
    other[there] += 1
    base = copy_with(tmp_path / "base", tiny("base"), lambda tensors: {**tensors, "model.position_ids": positions})
    tuned = copy_with(
        tmp_path / "tuned", tiny("base"), lambda tensors: {**moved(Q)(tensors), "model.position_ids": other}
    )
    if problem is None:
        assert {*captured(base, tuned, tmp_path / "patch").deltas} == {Q.removesuffix(".weight")}
        return
    with pytest.raises(PlanRefusedError, match=problem):
        captured(base, tuned, tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


def test_the_output_holds_the_files_of_a_patch(tiny, tmp_path):
    captured(tiny("base"), tiny("evolved", drift=0.05), tmp_path / "patch", rank=2)
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "patch.json"]
    assert sorted(contents(tmp_path / "patch")) == files


def test_progress_ends_with_all_bytes(tiny, tmp_path):
    calls = []
    captured(
        tiny("base"), tiny("evolved", drift=0.05), tmp_path / "patch", rank=2, progress=lambda *call: calls.append(call)
    )
    label, done, total, unit = calls[-1]
    assert label.startswith("capture")
    assert done == total > 0
    assert unit == "bytes"


def test_a_model_is_no_patch_of_itself(tiny, tmp_path):
    with pytest.raises(PlanRefusedError, match="are the same model"):
        captured(tiny("base"), tiny("base"), tmp_path / "patch")


def test_models_of_other_architectures_are_refused_with_every_reason(tiny):
    plan = plan_capture_tuned(*opened(tiny("base"), tiny("base", layers=3, inner=24)))
    reasons = [str(refusal) for refusal in plan.refusals]
    assert sum("does not" in reason for reason in reasons) == 9
    assert sum("The shapes must be equal" in reason for reason in reasons) == 6


def test_a_change_of_norms_alone_is_no_patch_that_peft_loads(tiny, tmp_path):
    base = tiny("base")
    tuned = copy_with(tmp_path / "tuned", base, moved(NORM))
    with pytest.raises(PlanRefusedError, match="no linear weight"):
        captured(base, tuned, tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


def test_a_weight_that_is_not_finite_is_refused(tiny, tmp_path):
    base = tiny("base")
    tuned = copy_with(tmp_path / "tuned", base, moved(Q, by=float("nan")))
    with pytest.raises(NonFiniteError, match=r"q_proj\.weight"):
        captured(base, tuned, tmp_path / "patch")
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_an_output_that_is_there_is_kept(tiny, tmp_path):
    (tmp_path / "patch").mkdir()
    with pytest.raises(OutputExistsError):
        captured(tiny("base"), tiny("evolved", drift=0.05), tmp_path / "patch", rank=2)


def test_an_output_around_an_input_is_refused(tiny, tmp_path):
    base = copy_with(tmp_path / "base", tiny("base"), dict)
    with pytest.raises(OutputError, match="which is an input"):
        captured(base, tiny("evolved", drift=0.05), tmp_path, rank=2, overwrite=True)


def write_tokenizer(folder, tokens):
    content = {"model": {"vocab": {token: row for row, token in enumerate(tokens)}}}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def with_vocabulary(folder, base, tokens, rows):
    """A copy of `base` whose embedding has the rows `rows`, for the tokens `tokens`, and a moved query projection."""
    tuned = copy_with(folder, base, lambda t: {**moved(Q)(t), EMBEDDING: rows})
    write_tokenizer(tuned, tokens)
    return tuned


TOKENS = [f"t{number}" for number in range(31)]


def test_rows_of_a_longer_vocabulary_follow_their_tokens(tiny, tmp_path):
    base = copy_with(tmp_path / "base", tiny("base", dtype=torch.float32), dict)
    write_tokenizer(base, TOKENS)
    rows = load_file(base / "model.safetensors")[EMBEDDING]
    # Two new tokens in front, t0 and t1 exchanged, t5 changed, t30 gone.
    order = [1, 0, *range(2, 30)]
    changed = rows.clone()
    changed[5] += 1.0
    tuned = with_vocabulary(
        tmp_path / "tuned",
        base,
        ["<new>", "<other>", *(TOKENS[row] for row in order)],
        torch.cat([torch.full((2, 12), 3.0), changed[order]]),
    )
    report = captured(base, tuned, tmp_path / "patch", rank=1)
    saved = load_file(tmp_path / "patch" / "adapter_model.safetensors")
    assert torch.equal(saved[f"base_model.model.{EMBEDDING}"], changed)
    assert report.left_out == {f"{EMBEDDING}[2 rows]": pytest.approx(3.0 * 24**0.5 / rows.norm().item(), rel=1e-4)}


def test_a_longer_vocabulary_that_changed_nothing_else_leaves_the_embedding_alone(tiny, tmp_path):
    base = copy_with(tmp_path / "base", tiny("base", dtype=torch.float32), dict)
    write_tokenizer(base, TOKENS)
    rows = load_file(base / "model.safetensors")[EMBEDDING]
    tuned = with_vocabulary(tmp_path / "tuned", base, [*TOKENS, "<new>"], torch.cat([rows, torch.ones(1, 12)]))
    report = captured(base, tuned, tmp_path / "patch", rank=1)
    assert report.values == {}
    assert set(report.left_out) == {f"{EMBEDDING}[1 rows]"}


def test_a_shorter_vocabulary_keeps_the_rows_of_the_base(tiny, tmp_path):
    base = copy_with(tmp_path / "base", tiny("base", dtype=torch.float32), dict)
    write_tokenizer(base, TOKENS)
    rows = load_file(base / "model.safetensors")[EMBEDDING]
    tuned = with_vocabulary(tmp_path / "tuned", base, TOKENS[3:], 2 * rows[3:])
    captured(base, tuned, tmp_path / "patch", rank=1)
    saved = load_file(tmp_path / "patch" / "adapter_model.safetensors")
    assert torch.equal(saved[f"base_model.model.{EMBEDDING}"], torch.cat([rows[:3], 2 * rows[3:]]))


def test_vocabularies_of_other_length_need_tokenizers(tiny, tmp_path):
    base = tiny("base", dtype=torch.float32)
    rows = load_file(base / "model.safetensors")[EMBEDDING]
    tuned = copy_with(tmp_path / "tuned", base, lambda t: {**t, EMBEDDING: torch.cat([rows, rows[:1]])})
    with pytest.raises(PlanRefusedError, match=r"tokenizer\.json"):
        captured(base, tuned, tmp_path / "patch")
