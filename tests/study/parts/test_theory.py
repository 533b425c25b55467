import json
import shutil

import pytest

from portllm.checkpoint.open import open_checkpoint
from portllm.errors import PortLLMError
from portllm.patch.adapter_folder import load_patch
from portllm.study.definition.settings import RowsTask
from portllm.study.parts.theory import TheorySettings, measure_theory
from portllm.study.schedule.tasks import open_task
from tests.models import make_adapter, make_evolved

ROWS = [
    {"question": "what causes measles?", "kind": "cause"},
    {"question": "how is a fever treated?", "kind": "treatment"},
    {"question": "what causes a cold?", "kind": "cause"},
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = RowsTask(
        train="rows.jsonl", score="rows.jsonl", prompt="{question} Kind:", completion="kind", judge="labels", labels=()
    )
    return open_task(task, folder)


def test_the_three_parts_are_measured_and_are_json(reader, source, tmp_path):
    evolved = make_evolved(reader, tmp_path / "evolved")
    for file in reader.glob("tokenizer*"):
        shutil.copy(file, evolved)
    patch, retrained = (make_adapter(reader, tmp_path / str(seed), seed=seed, size=0.1) for seed in (1, 2))
    settings = TheorySettings(points=(0.0, 0.5, 1.0), gradient_rows=2)
    found = measure_theory(
        open_checkpoint(reader),
        open_checkpoint(evolved),
        load_patch(patch),
        load_patch(retrained),
        source=source,
        settings=settings,
        device="cpu",
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found["residual"]["modules"]) == set(found["expansion"]["modules"])
    assert len(found["residual"]["modules"]) == 14
    assert len(found["line"]["losses"]) == 3
    assert (found["line"]["rows"], found["expansion"]["rows"]) == (3, 2)


def test_settings_out_of_range_are_all_named():
    with pytest.raises(PortLLMError) as caught:
        TheorySettings(gradient_rows=0, points=(0.0, 0.5), sketch=0)
    for name in ("gradient_rows is 0", "points is", "sketch is 0"):
        assert name in str(caught.value)
