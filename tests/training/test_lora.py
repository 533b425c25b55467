import json
import math

import pytest
import torch
from safetensors.torch import load_file

from portllm.errors import AdapterFormatError, DataError, OutputExistsError, PortLLMError
from portllm.running.encoding import Encoder
from portllm.running.examples import Example
from portllm.running.loss import completion_nats
from portllm.running.model import attach_adapter, load_model, load_tokenizer
from portllm.training.lora import encode_all, train_lora
from portllm.training.settings import TrainSettings

CPU = torch.device("cpu")

EXAMPLES = [
    Example(prompt="what causes measles? Kind:", completion="cause"),
    Example(prompt="what are the treatments for a cold? Kind:", completion="treatment"),
    Example(prompt="how is a fever treated? Kind:", completion="treatment"),
    Example(prompt="what causes a cold? Kind:", completion="cause"),
    Example(prompt="what are the symptoms of measles? Kind:", completion="symptoms"),
]

QUICK = TrainSettings(rank=2, alpha=4, learning_rate=5e-2, steps=30, batch_size=2, max_tokens=64)


def train(reader, folder, **changes):
    settings = TrainSettings(**{name: getattr(QUICK, name) for name in QUICK.__slots__} | changes)
    return train_lora(reader, EXAMPLES, settings, folder, device="cpu")


@pytest.fixture(scope="module")
def trained(reader, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    return folder, train(reader, folder)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@torch.no_grad()
def loss(model, reader):
    encoder = Encoder(load_tokenizer(reader))
    rows = encode_all(encoder, EXAMPLES, max_tokens=64)
    return float(completion_nats(model, rows, device=CPU).sum())


def test_the_same_base_rows_and_settings_give_the_same_bytes(trained, reader, tmp_path):
    torch.manual_seed(99)
    train(reader, tmp_path / "again")
    assert files(tmp_path / "again") == files(trained[0])


def test_the_seed_changes_the_adapter(trained, reader, tmp_path):
    train(reader, tmp_path / "other", seed=1)
    assert (tmp_path / "other" / "adapter_model.safetensors").read_bytes() != files(trained[0])[
        "adapter_model.safetensors"
    ]


def test_the_trained_adapter_makes_the_right_completions_likelier(trained, reader):
    before = loss(load_model(reader, device=CPU), reader)
    after = loss(attach_adapter(load_model(reader, device=CPU), trained[0], name="patch"), reader)
    assert after < 0.9 * before


def test_the_report_counts_what_was_done(trained):
    report = trained[1]
    assert (report.steps, len(report.losses), report.n_rows, report.n_cut_rows) == (30, 30, 5, 0)
    assert report.losses[-1] < report.losses[0]
    assert (report.device, report.peak_bytes) == ("cpu", None)
    # Rank 2 on the seven modules of two layers, 2 * (d_out + d_in) each.
    assert report.n_trained == 2 * 2 * (30 + 18 + 18 + 30 + 32 + 32 + 32)


def test_the_factors_are_float32_and_on_the_papers_seven_modules(trained):
    folder, _ = trained
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {name.split(".")[-3] for name in tensors} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert all(bool(tensor.any()) for tensor in tensors.values())


def test_the_adapter_folder_is_what_peft_needs_and_nothing_more(trained):
    folder, _ = trained
    assert set(files(folder)) == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 4, False)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_modules_and_scale_are_those_asked_for(reader, tmp_path):
    train(reader, tmp_path / "two", target_modules=("q_proj", "v_proj"), use_rslora=True, steps=1)
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["use_rslora"]) == (["q_proj", "v_proj"], True)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 6), (0.4, 2), (0.01, 1)])
def test_epochs_count_batches_where_no_steps_are_given(reader, tmp_path, epochs, steps):
    assert train(reader, tmp_path / "adapter", steps=None, epochs=epochs).steps == steps


def test_the_callers_random_numbers_are_left_alone(reader, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train(reader, tmp_path / "adapter", steps=1, dropout=0.5)
    assert torch.equal(torch.rand(4), expected)


def test_gradient_checkpointing_trains_the_same_adapter(trained, reader, tmp_path):
    train(reader, tmp_path / "checkpointed", gradient_checkpointing=True)
    expected = load_file(trained[0] / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "checkpointed" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_long_rows_lose_the_beginning_of_the_prompt_and_are_counted(reader, tmp_path):
    encoder = Encoder(load_tokenizer(reader))
    lengths = sorted(len(row.prompt) + len(row.completion) + 1 for row in encode_all(encoder, EXAMPLES, max_tokens=999))
    report = train(reader, tmp_path / "cut", max_tokens=lengths[2], steps=3)
    assert report.n_cut_rows == sum(length > lengths[2] for length in lengths) > 0


def test_completions_that_leave_no_room_are_all_told_before_training(reader, tmp_path):
    with pytest.raises(DataError, match="5 of 5 examples are invalid") as caught:
        train(reader, tmp_path / "adapter", max_tokens=2)
    assert "example 5:" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_no_examples_are_refused(reader, tmp_path):
    with pytest.raises(DataError, match="no examples were given"):
        train_lora(reader, [], QUICK, tmp_path / "adapter", device="cpu")


def test_a_folder_that_exists_is_kept_unless_it_may_be_replaced(reader, tmp_path):
    (tmp_path / "patch.json").write_text("mine")
    with pytest.raises(OutputExistsError):
        train_lora(reader, EXAMPLES, QUICK, tmp_path, device="cpu")
    assert files(tmp_path) == {"patch.json": b"mine"}
    train_lora(reader, EXAMPLES, TrainSettings(steps=1), tmp_path, device="cpu", overwrite=True)
    assert set(files(tmp_path)) == {"adapter_config.json", "adapter_model.safetensors"}


def test_modules_that_the_base_does_not_have_are_refused(reader, tmp_path):
    with pytest.raises(AdapterFormatError, match="c_attn"):
        train(reader, tmp_path / "adapter", target_modules=("c_attn",))


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_nothing(reader, tmp_path):
    with pytest.raises(PortLLMError, match=r"the loss is nan at step \d+ of 30; nothing was written"):
        train(reader, tmp_path / "adapter", learning_rate=1e20, warmup=0.0)
    assert not list(tmp_path.iterdir())


def test_progress_is_told_of_every_step_with_its_loss(reader, tmp_path):
    told = []
    settings = TrainSettings(steps=3, batch_size=2)
    report = train_lora(
        reader, EXAMPLES, settings, tmp_path / "a", device="cpu", progress=lambda *what: told.append(what)
    )
    labels = ["train", *(f"train: loss {loss:.3f}" for loss in report.losses)]
    assert told == [(label, done, 3, "steps") for done, label in enumerate(labels)]


def test_all_settings_out_of_range_are_named():
    with pytest.raises(PortLLMError) as caught:
        TrainSettings(rank=0, dropout=1.0, learning_rate=math.inf, steps=0, warmup=1.0)
    for name in ("rank is 0", "dropout is 1.0", "learning_rate is inf", "steps is 0", "warmup is 1.0"):
        assert name in str(caught.value)
