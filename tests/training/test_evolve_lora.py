"""An evolution by LoRA: an adapter of the base, trained on text, the same bytes each time."""

import pytest

from portllm.errors import DataError, OutputExistsError, PortLLMError
from portllm.patch.adapter_folder import load_patch
from portllm.training.evolve_lora import LoraEvolveSettings, train_on_text
from tests.language import TEXT

TEXTS = TEXT.strip().splitlines()
QUICK = LoraEvolveSettings(rank=3, alpha=12, learning_rate=5e-2, steps=40, batch_size=2, block_tokens=24)


@pytest.fixture(scope="module")
def trained(reader, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    return folder, train_on_text(reader, TEXTS, QUICK, folder, device="cpu")


def test_the_text_becomes_likelier(trained):
    losses = trained[1]
    assert len(losses) == 40
    assert sum(losses[-5:]) < sum(losses[:5]) - 1.0


def test_the_adapter_is_on_every_linear_layer_with_the_rank_asked_for(trained):
    deltas = load_patch(trained[0]).deltas
    assert len(deltas) == 2 * 7
    assert {delta.rank for delta in deltas.values()} == {3}


def test_the_same_base_texts_and_settings_give_the_same_bytes(trained, reader, tmp_path):
    train_on_text(reader, TEXTS, QUICK, tmp_path / "again", device="cpu")
    for file in trained[0].iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_too_little_text_and_a_folder_that_exists_are_refused(trained, reader, tmp_path):
    with pytest.raises(DataError, match="do not fill one block of 24"):
        train_on_text(reader, ["cold"], QUICK, tmp_path / "out", device="cpu")
    with pytest.raises(OutputExistsError):
        train_on_text(reader, TEXTS, QUICK, trained[0], device="cpu")
    assert not list(tmp_path.iterdir())


def test_all_settings_out_of_range_are_named():
    with pytest.raises(PortLLMError, match="rank is 0.*alpha is 0"):
        LoraEvolveSettings(rank=0, alpha=0)
    with pytest.raises(PortLLMError, match="steps is 0"):
        LoraEvolveSettings(steps=0)
