import json

import pytest
import torch
from safetensors.torch import load_file

from portllm.errors import AdapterFormatError, DataError
from portllm.running.encoding import Encoder
from portllm.running.loss import IGNORED
from portllm.running.model import load_tokenizer
from portllm.training.distil_lora import TeacherFolders, distil_lora, mean_divergence
from portllm.training.lora import train_lora
from portllm.training.settings import TrainSettings
from tests.language import make_reader, metaspace_tokenizer
from tests.models import make_adapter, make_evolved
from tests.training.test_lora import EXAMPLES, QUICK

PROMPTS = [example.prompt for example in EXAMPLES]
STILL = TrainSettings(learning_rate=1e-30, steps=1, batch_size=2)
"""A step that is too small for any float32 factor to notice."""


@pytest.fixture(scope="module")
def taught(reader, tmp_path_factory):
    """A teacher that has learned, and a later version of its base."""
    folder = tmp_path_factory.mktemp("taught")
    settings = TrainSettings(rank=2, alpha=4, learning_rate=5e-2, steps=60, batch_size=5, max_tokens=64)
    train_lora(reader, EXAMPLES, settings, folder / "adapter", device="cpu")
    evolved = make_evolved(reader, folder / "evolved", drift=0.02)
    load_tokenizer(reader).save_pretrained(evolved)
    return TeacherFolders(reader, folder / "adapter", max_new_tokens=8), evolved


def test_the_divergence_is_torchs_and_leaves_padding_out():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 3, 7, generator=generator) for _ in range(2))
    targets = torch.tensor([[IGNORED, 1, 2], [3, 4, 5]])
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    here = targets != IGNORED
    torch.testing.assert_close(mean_divergence(teacher, student, targets), expected[here].mean())


def test_the_student_comes_closer_to_the_teacher(taught, tmp_path):
    teacher, evolved = taught
    report = distil_lora(evolved, PROMPTS, teacher, QUICK, tmp_path / "student", device="cpu")
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert (report.n_rows, report.steps) == (len(PROMPTS), QUICK.steps)


def test_the_same_teacher_prompts_and_settings_give_the_same_bytes(taught, tmp_path):
    teacher, evolved = taught
    for name in ("one", "other"):
        distil_lora(evolved, PROMPTS, teacher, TrainSettings(steps=2), tmp_path / name, device="cpu")
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


def test_a_student_that_is_the_teacher_has_nothing_to_learn(taught, tmp_path):
    teacher, _ = taught
    report = distil_lora(teacher.base, PROMPTS, teacher, STILL, tmp_path / "same", device="cpu", start=teacher.adapter)
    assert report.losses[0] == pytest.approx(0.0, abs=1e-6)


def test_the_teacher_writes_no_more_than_it_may_and_prompts_are_cut_for_it(taught, tmp_path):
    teacher, evolved = taught
    longest = max(len(Encoder(load_tokenizer(evolved)).encode_text(prompt)) for prompt in PROMPTS)
    settings = TrainSettings(steps=1, max_tokens=longest - 1 + teacher.max_new_tokens)
    report = distil_lora(evolved, PROMPTS, teacher, settings, tmp_path / "cut", device="cpu")
    assert report.n_cut_rows == 1
    with pytest.raises(DataError, match="With a limit of"):
        distil_lora(evolved, PROMPTS, teacher, TrainSettings(max_tokens=8), tmp_path / "no", device="cpu")


def test_models_of_different_tokens_are_refused(taught, tmp_path):
    teacher, _ = taught
    other = make_reader(tmp_path / "other")
    metaspace_tokenizer().save_pretrained(other)
    with pytest.raises(DataError, match="different vocabularies"):
        distil_lora(other, PROMPTS, teacher, QUICK, tmp_path / "student", device="cpu")
    assert not (tmp_path / "student").exists()


def test_no_prompts_are_refused(taught, tmp_path):
    teacher, evolved = taught
    with pytest.raises(DataError, match="no prompts"):
        distil_lora(evolved, [], teacher, QUICK, tmp_path / "student", device="cpu")


@pytest.mark.parametrize("lora", [{}, {"r": 2, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}])
def test_an_adapter_that_is_started_from_and_not_moved_is_the_same(reader, tmp_path, lora):
    start = make_adapter(reader, tmp_path / "start", **lora)
    train_lora(reader, EXAMPLES, STILL, tmp_path / "same", device="cpu", start=start)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (start, tmp_path / "same"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (start, tmp_path / "same")]
    for field in ("r", "lora_alpha", "use_rslora"):
        assert configs[0][field] == configs[1][field]


def test_a_start_in_half_precision_is_trained_on_in_float32(reader, tmp_path):
    start = make_adapter(reader, tmp_path / "start", dtype=torch.bfloat16)
    train_lora(reader, EXAMPLES, STILL, tmp_path / "same", device="cpu", start=start)
    assert {t.dtype for t in load_file(tmp_path / "same" / "adapter_model.safetensors").values()} == {torch.float32}


def test_from_a_good_start_the_first_loss_is_lower(taught, tmp_path):
    teacher, evolved = taught
    fresh = train_lora(evolved, EXAMPLES, QUICK, tmp_path / "fresh", device="cpu")
    started = train_lora(evolved, EXAMPLES, QUICK, tmp_path / "started", device="cpu", start=teacher.adapter)
    assert started.losses[0] < fresh.losses[0]
    assert max(started.losses[-5:]) < fresh.losses[0]  # what was started from is not lost; two rows a step are noisy


def test_a_start_that_does_not_land_is_refused(reader, tiny, tmp_path):
    start = make_adapter(tiny("base", layers=3), tmp_path / "start")
    with pytest.raises(AdapterFormatError):
        train_lora(reader, EXAMPLES, QUICK, tmp_path / "adapter", device="cpu", start=start)
    assert not (tmp_path / "adapter").exists()
