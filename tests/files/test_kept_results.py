"""Results are reused only where the key and the files prove that they are the same."""

import pytest

from portllm.errors import CheckpointError
from portllm.files.kept_results import keep


class Work:
    """Writes a file and counts how often."""

    def __init__(self, file):
        self.file, self.times = file, 0

    def __call__(self):
        self.times += 1
        self.file.write_text("made")
        return {"numbers": (1, 2.5), "times": self.times}

    def identify(self):
        if not self.file.exists():
            raise CheckpointError("gone")
        return self.file.read_text()


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path / "output")


def test_the_same_work_is_done_once(tmp_path, work):
    first = keep(tmp_path / "steps" / "a.json", inputs={"seed": 0}, identify=work.identify, work=work)
    second = keep(tmp_path / "steps" / "a.json", inputs={"seed": 0}, identify=work.identify, work=work)
    assert (first.reused, second.reused, work.times) == (False, True, 1)
    assert second.result == first.result == {"numbers": [1, 2.5], "times": 1}
    assert second.seconds == first.seconds


@pytest.mark.parametrize("spoil", ["inputs", "files", "gone", "record"])
def test_it_is_done_again_when_anything_differs(tmp_path, work, spoil):
    record = tmp_path / "a.json"
    keep(record, inputs={"seed": 0}, identify=work.identify, work=work)
    match spoil:
        case "files":
            work.file.write_text("edited by hand")
        case "gone":
            work.file.unlink()
        case "record":
            record.write_text(record.read_text()[:-20])
    kept = keep(record, inputs={"seed": 1 if spoil == "inputs" else 0}, identify=work.identify, work=work)
    assert (kept.reused, work.times) == (False, 2)


def test_another_version_of_a_program_does_the_work_again(tmp_path, work, monkeypatch):
    keep(tmp_path / "a.json", inputs={}, identify=work.identify, work=work)
    monkeypatch.setattr("portllm.files.kept_results.versions", lambda: {"torch": "another"})
    assert not keep(tmp_path / "a.json", inputs={}, identify=work.identify, work=work).reused


def test_work_that_fails_leaves_no_record(tmp_path, work):
    keep(tmp_path / "a.json", inputs={"seed": 0}, identify=work.identify, work=work)

    def fail():
        raise CheckpointError("broken")

    with pytest.raises(CheckpointError):
        keep(tmp_path / "a.json", inputs={"seed": 1}, identify=work.identify, work=fail)
    assert not (tmp_path / "a.json").exists()
