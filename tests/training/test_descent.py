"""Batches whose logits do not fit into memory at once: trained in parts, with the losses and gradients of the whole."""

import pytest
import torch

from portllm.running import encoding
from portllm.training import descent, distil_lora, evolve, evolve_lora, lora
from portllm.training.settings import TrainSettings
from tests.language import TEXT
from tests.models import make_adapter
from tests.training.test_lora import EXAMPLES

STEPS, ROWS = 4, 3
HOW = {"learning_rate": 5e-2, "steps": STEPS, "batch_size": ROWS}


def tune(reader, folder):
    return lora.train_lora(reader, EXAMPLES, TrainSettings(rank=2, alpha=4, max_tokens=64, **HOW), folder, device="cpu")


def learn(reader, folder):
    teacher = distil_lora.TeacherFolders(
        reader, make_adapter(reader, folder.with_name("teacher"), size=0.2), max_new_tokens=4
    )
    prompts, how = [each.prompt for each in EXAMPLES], TrainSettings(rank=2, alpha=4, max_tokens=64, **HOW)
    return distil_lora.distil_lora(reader, prompts, teacher, how, folder, device="cpu")


def read_with_lora(reader, folder):
    how = evolve_lora.LoraEvolveSettings(rank=3, alpha=12, block_tokens=24, **HOW)
    return evolve_lora.train_on_text(reader, TEXT.strip().splitlines(), how, folder, device="cpu")


def read(reader, folder):
    how = evolve.EvolveSettings(block_tokens=24, **HOW)
    return evolve.evolve(reader, TEXT.strip().splitlines(), how, folder, device="cpu")


@pytest.mark.parametrize("run", [tune, learn, read_with_lora, read])
def test_a_batch_in_parts_is_trained_on_as_a_whole(run, reader, tmp_path, monkeypatch):
    n_parts = 0
    backward = torch.autograd.backward

    def counted(loss):
        nonlocal n_parts
        n_parts += 1
        backward(loss)

    monkeypatch.setattr(descent.torch.autograd, "backward", counted)
    whole, n_whole = losses(run(reader, tmp_path / "whole")), n_parts
    monkeypatch.setattr(encoding, "LOGITS", 1)
    assert losses(run(reader, tmp_path / "parts")) == pytest.approx(whole, rel=1e-3)
    assert n_whole == STEPS
    assert n_whole < n_parts - n_whole <= ROWS * STEPS


def losses(report):
    return report if isinstance(report, tuple) else report.losses
