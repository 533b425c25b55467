"""Which tensor is which: spellings, ties, layouts of experts, other shapes; nothing is left unaccounted for."""

import pytest
import torch

from portllm.checking.update.drift import measure_drift
from portllm.checkpoint.open import open_checkpoint
from portllm.matching.tensor_pairs import pair_tensors
from portllm.tensors.tensors import load
from tests.safetensors_files import write_tensors


def paired(base, evolved):
    return pair_tensors(open_checkpoint(base), open_checkpoint(evolved))


def test_every_tensor_of_both_models_is_accounted_for(tiny):
    base, evolved = tiny("base", tied=False), tiny("base", layers=3, inner=24)
    pairing = paired(base, evolved)
    before, after = (set(open_checkpoint(folder).infos) for folder in (base, evolved))
    both = set(pairing.pairs) | set(pairing.reshaped)
    assert both | set(pairing.removed) == before
    assert both | set(pairing.added) == after
    assert pairing.removed == ("lm_head.weight",)
    assert "model.layers.0.mlp.up_proj.weight" in pairing.reshaped
    assert all(name.startswith("model.layers.2.") for name in pairing.added)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3-vision", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize("swapped", [False, True])
def test_another_spelling_or_layout_of_the_same_weights_has_no_drift(kind, swapped, tmp_path):
    from tests import families

    folders = [families.make_base(kind, tmp_path / str(current), current=current) for current in (False, True)]
    base, evolved = reversed(folders) if swapped else folders
    report = measure_drift(open_checkpoint(base), open_checkpoint(evolved))
    assert report.left_out == ()
    assert report.total.drift_sq == 0.0
    assert report.total.base_sq > 0


@pytest.mark.parametrize("fused_evolved", [False, True])
def test_a_change_of_one_expert_is_found_in_its_matrix_in_either_layout(fused_evolved, tmp_path):
    from safetensors.torch import load_file, save_file

    from tests import families

    base = families.make_base("qwen3-moe", tmp_path / "base", current=not fused_evolved)
    evolved = families.make_base("qwen3-moe", tmp_path / "evolved", current=fused_evolved)
    tensors = load_file(evolved / "model.safetensors")
    if fused_evolved:
        tensors["model.layers.1.mlp.experts.gate_up_proj"][2, 20] += 1  # up: behind the 16 rows of gate
    else:
        tensors["model.layers.1.mlp.experts.2.up_proj.weight"][4] += 1
    save_file(tensors, evolved / "model.safetensors")
    report = measure_drift(open_checkpoint(base), open_checkpoint(evolved))
    moved = {name for name, sums in report.tensors.items() if sums.drift_sq}
    assert moved == {"model.layers.1.mlp.experts.2.up_proj.weight"}
    pair = paired(base, evolved).pairs["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert pair.first_row == (2 * 32 + 16 if fused_evolved else 0)
    assert not torch.equal(load(pair.base), load(pair.evolved))


def test_experts_of_other_numbers_are_left_out_by_name(tmp_path):
    from tests import families

    base = families.make_base("qwen3-moe", tmp_path / "base", current=False)
    evolved = families.make_base("qwen3-moe", tmp_path / "evolved", current=True)
    from safetensors.torch import load_file, save_file

    tensors = load_file(evolved / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = tensors[name][:2].clone()
    save_file(tensors, evolved / "model.safetensors")
    pairing = paired(base, evolved)
    assert pairing.added == (name,)
    assert all("layers.0.mlp.experts." in removed for removed in pairing.removed)


def test_of_a_larger_vocabulary_the_rows_of_both_are_compared(tmp_path):
    row = bytes(range(8))
    config = '{"model_type": "llama"}'
    for name, rows in (("base", 3), ("evolved", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        write_tensors(
            tmp_path / name / "model.safetensors", {"model.embed_tokens.weight": ("F32", (rows, 2), row * rows)}
        )
    pairing = paired(tmp_path / "base", tmp_path / "evolved")
    assert pairing.grown == {"model.embed_tokens.weight": (3, 5)}
    (pair,) = pairing.pairs.values()
    assert (pair.base.shape, pair.evolved.shape, pair.evolved.n_bytes) == ((3, 2), (3, 2), 24)
