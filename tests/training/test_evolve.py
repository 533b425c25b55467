import math

import pytest
import torch
from safetensors.torch import load_file

from portllm.errors import DataError, OutputExistsError, PortLLMError
from portllm.running.model import load_model, load_tokenizer
from portllm.training.evolve import EvolveSettings, evolve
from tests.language import TEXT, make_reader

TEXTS = TEXT.strip().splitlines()
QUICK = EvolveSettings(learning_rate=2e-2, steps=20, batch_size=2, block_tokens=24)


@pytest.fixture(scope="module")
def evolved(reader, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evolved") / "checkpoint"
    return folder, evolve(reader, TEXTS, QUICK, folder, device="cpu")


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_the_same_base_texts_and_settings_give_the_same_bytes(evolved, reader, tmp_path):
    evolve(reader, TEXTS, QUICK, tmp_path / "again", device="cpu")
    for file in evolved[0].iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_evolved_model_has_the_names_shapes_and_dtypes_of_the_base(evolved, reader):
    before, after = weights(reader), weights(evolved[0])
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}


def test_every_weight_moves_and_the_drift_is_that_of_the_files(evolved, reader):
    before, after = weights(reader), weights(evolved[0])
    assert all(not torch.equal(before[name], after[name]) for name in before)
    moved = math.sqrt(sum(float((after[name].double() - before[name].double()).square().sum()) for name in before))
    size = math.sqrt(sum(float(before[name].double().square().sum()) for name in before))
    assert evolved[1].drift == pytest.approx(moved / size, rel=1e-9)


def test_the_text_becomes_likelier(evolved):
    losses = evolved[1].losses
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5


def test_the_report_counts_what_was_done(evolved):
    report = evolved[1]
    assert (report.steps, report.n_tokens, report.device, report.peak_bytes) == (20, 20 * 2 * 24, "cpu", None)
    assert report.n_trained == sum(tensor.numel() for tensor in weights(evolved[0]).values())


def test_the_evolved_folder_loads_with_the_tokenizer_of_the_base(evolved, reader):
    folder, _ = evolved
    load_model(folder, device=torch.device("cpu"))
    assert (
        load_tokenizer(folder)("what causes a cold?")["input_ids"]
        == load_tokenizer(reader)("what causes a cold?")["input_ids"]
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (reader / name).read_bytes()


def test_updates_too_small_for_the_stored_dtype_add_up(tmp_path):
    """One update of AdamW moves a weight by the learning rate, here a hundredth of bfloat16's step at 0.2 to 1."""
    base = make_reader(tmp_path / "base")
    settings = EvolveSettings(learning_rate=2e-5, steps=40, batch_size=1, block_tokens=16, warmup=0.0, decay="constant")
    report = evolve(base, TEXTS, settings, tmp_path / "evolved", device="cpu")
    twin = evolve(
        make_reader(tmp_path / "base32", dtype=torch.float32), TEXTS, settings, tmp_path / "evolved32", device="cpu"
    )
    assert report.drift == pytest.approx(twin.drift, rel=0.7)
    assert report.drift > 0.0


def test_too_little_text_is_refused(reader, tmp_path):
    with pytest.raises(DataError, match="do not fill one block of 24"):
        evolve(reader, ["cold"], QUICK, tmp_path / "evolved", device="cpu")
    with pytest.raises(DataError, match="0 texts with 0 tokens"):
        evolve(reader, [], QUICK, tmp_path / "evolved", device="cpu")
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_nothing(reader, tmp_path):
    settings = EvolveSettings(learning_rate=1e20, steps=6, batch_size=1, block_tokens=16, warmup=0.0)
    with pytest.raises(PortLLMError, match=r"the loss is nan at step \d of 6; nothing was written"):
        evolve(reader, TEXTS, settings, tmp_path / "evolved", device="cpu")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_kept(reader, tmp_path):
    with pytest.raises(OutputExistsError):
        evolve(reader, TEXTS, QUICK, tmp_path, device="cpu")


def test_progress_is_told_of_every_step(reader, tmp_path):
    told = []
    settings = EvolveSettings(steps=2, batch_size=1, block_tokens=16)
    evolve(reader, TEXTS, settings, tmp_path / "e", device="cpu", progress=lambda *what: told.append(what))
    assert [(label.split(":")[0], *rest) for label, *rest in told] == [("evolve", n, 2, "steps") for n in range(3)]


def test_all_settings_out_of_range_are_named():
    with pytest.raises(PortLLMError) as caught:
        EvolveSettings(learning_rate=0.0, steps=0, block_tokens=1)
    for name in ("learning_rate is 0.0", "steps is 0", "block_tokens is 1"):
        assert name in str(caught.value)
