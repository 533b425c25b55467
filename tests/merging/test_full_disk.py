"""A disk that fills up while a patch is written: one error that names the output, and nothing under its name."""

import json
import os

import pytest

from portllm.capturing.adapter import capture_adapter
from portllm.capturing.tuned import capture_tuned
from portllm.checkpoint.open import open_checkpoint
from portllm.combining.combine import combine
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from tests.processes import limited
from tests.safetensors_files import contents


@pytest.fixture
def ways(tiny, tmp_path):
    """What writes a patch, by name: each a function of the output."""
    base, evolved = open_checkpoint(tiny("base")), open_checkpoint(tiny("evolved"))
    dora = load_patch(tiny("adapter", use_dora=True))
    adapter = load_patch(tiny("adapter"))
    captured = capture_adapter(adapter, base=base, out=tmp_path / "inputs" / "captured")
    return {
        "capture": lambda out: capture_adapter(adapter, base=base, out=out, overwrite=True),
        "capture tuned": lambda out: capture_tuned(base, evolved, out=out, rank=2, overwrite=True),
        "port": lambda out: port(adapter, base=base, evolved=evolved, out=out, overwrite=True),
        "port, re-based": lambda out: port(dora, base=base, evolved=evolved, out=out, overwrite=True),
        "combine": lambda out: combine([captured, captured], out=out, overwrite=True),
    }


@pytest.mark.parametrize("way", ["capture", "capture tuned", "port", "port, re-based", "combine"])
@pytest.mark.parametrize("n_bytes", [100, 1500])
def test_a_disk_that_fills_up_leaves_the_old_patch_and_nothing_else(way, n_bytes, ways, tmp_path, monkeypatch):
    monkeypatch.setenv("PORTLLM_CACHE", str(tmp_path / "no cache"))
    place = tmp_path / "place"
    (place / "out").mkdir(parents=True)
    (place / "out" / "config.json").write_text("x")
    assert limited(n_bytes, lambda: ways[way](place / "out")) == 0
    assert contents(place) == {"out/config.json": b"x"}
    ways[way](place / "out")
    assert os.listdir(place) == ["out"]
    assert json.loads((place / "out" / "patch.json").read_text())["format"] == 1
