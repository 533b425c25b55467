"""Controls: models without training of which it is known what a ported patch is worth there."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError, OutputExistsError, PortLLMError
from portllm.study.parts.control import ReinitSettings, TwinSettings, make_control, redrawn
from tests.models import SEVERAL_SHARDS, make_base

IDS = torch.arange(8)[None]


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_twin_on_disk_computes_what_its_base_computes(tmp_path, tied):
    base = make_base(tmp_path / "base", tied=tied, max_shard_size=SEVERAL_SHARDS)
    make_control(open_checkpoint(base), TwinSettings(seed=4), tmp_path / "twin")
    assert (logits(tmp_path / "twin") - logits(base)).abs().max() < 1e-4 * logits(base).abs().max()
    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "twin")
    assert {name: (i.dtype, i.shape) for name, i in before.infos.items()} == {
        name: (i.dtype, i.shape) for name, i in after.infos.items()
    }
    assert (tmp_path / "twin" / "config.json").read_text() == (base / "config.json").read_text()


def test_only_the_layers_named_are_drawn_anew_with_their_mean_and_spread(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.float32)
    make_control(open_checkpoint(base), ReinitSettings(layers=(1,), seed=5), tmp_path / "new")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "new"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers.1." in name}


def test_without_layers_every_weight_is_drawn_anew(tmp_path):
    base = make_base(tmp_path / "base")
    make_control(open_checkpoint(base), ReinitSettings(), tmp_path / "new")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "new"))
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_draws_keep_mean_and_spread_and_follow_from_name_and_seed():
    tensor = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)) * 0.3 + 2
    drawn = redrawn(tensor, name="a", seed=1)
    assert drawn.mean().item() == pytest.approx(2, abs=0.01)
    assert drawn.std().item() == pytest.approx(0.3, rel=0.02)
    assert torch.nn.functional.cosine_similarity((drawn - 2).flatten(), (tensor - 2).flatten(), dim=0).abs() < 0.02
    assert torch.equal(drawn, redrawn(tensor, name="a", seed=1))
    assert not torch.equal(drawn, redrawn(tensor, name="b", seed=1))
    assert not torch.equal(drawn, redrawn(tensor, name="a", seed=2))


def test_what_cannot_be_is_refused(tmp_path):
    base = open_checkpoint(make_base(tmp_path / "base"))
    with pytest.raises(CheckpointError, match="has no layer 7"):
        make_control(base, ReinitSettings(layers=(0, 7)), tmp_path / "out")
    with pytest.raises(CheckpointError, match="config.json lacks one of"):
        make_control(open_checkpoint(make_base(tmp_path / "gpt2", kind="gpt2")), TwinSettings(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError):
        make_control(base, TwinSettings(), tmp_path / "out")
    with pytest.raises(PortLLMError, match="layers is"):
        ReinitSettings(layers=(-1,))
