"""The command `fleet`: what a user sees, and the exit status."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

import portllm as package
from portllm.fleets import fleet
from tests.fleets.conftest import Here

PAGE = (Path(__file__).parents[2] / "docs" / "fleet.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def workers_find_this_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(package.__file__).parents[1]))


@pytest.fixture
def folder(tiny, tmp_path):
    """What the file on the page names."""
    for name, source in {
        "base-v1": tiny("base"),
        "base-v2": tiny("evolved"),
        "base-v3": tiny("evolved", seed=5),
        "adapters/a": tiny("adapter"),
        "teams/red/final": tiny("adapter", seed=2),
    }.items():
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "fleet.toml").write_text(re.search(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)[1])
    return tmp_path


@pytest.fixture
def in_this_process(monkeypatch):
    """The fleet's cells are done here, and not in a process that has to load everything first."""
    monkeypatch.setattr(fleet, "open_pool", lambda plan, **how: Here())


def test_the_file_on_the_page_runs_as_the_page_says(portllm, folder):
    dry = portllm("fleet", folder / "fleet.toml", "--dry-run")
    assert dry.status == 0
    assert "4 cells: 4 would be done" in dry.out
    assert not (folder / "fleet-out").exists()
    done = portllm("fleet", folder / "fleet.toml", "--workers", 1)
    assert done.status == 0
    assert re.search(r"base-v3 +red--final +[\d.]+ kB +done +drift [\d.]+ %, merged [\d.]+ kB, kept gain", done.out)
    again = portllm("fleet", folder / "fleet.toml")
    assert "4 cells: 4 done before" in again.out
    assert portllm("verify", folder / "fleet-out/base-v2/a/merge", "--base", folder / "base-v2").status == 0


def test_a_cell_that_fails_is_named_and_the_status_is_one(portllm, tiny, folder, in_this_process):
    shutil.copytree(tiny("adapter", of=tiny("base", inner=24)), folder / "adapters" / "misfit")
    result = portllm("fleet", folder / "fleet.toml", "--json", "--workers", 1)
    assert result.status == 1
    cells = {(cell["evolved"], os.path.basename(cell["patch"])): cell for cell in json.loads(result.out)["cells"]}
    assert cells["base-v2", "misfit"]["status"] == "refused"
    assert cells["base-v2", "a"]["status"] == "done"
    table = portllm("fleet", folder / "fleet.toml", "--workers", 1)
    assert re.search(
        r"^base-v2/misfit: .*down_proj.*\(and \d+ more lines; --json has them all\)$", table.out, re.MULTILINE
    )


def test_a_patch_that_will_not_hold_ends_with_three(portllm, tiny, folder, in_this_process):
    shutil.copytree(tiny("base", seed=9), folder / "stranger")
    file = folder / "fleet.toml"
    file.write_text(
        file.read_text().replace('"base-v2", "base-v3"', '"stranger"').replace('["port"', '["check", "port"')
    )
    result = portllm("fleet", file, "--workers", 1)
    assert result.status == 3
    assert re.search(r"stranger +a +[\d.]+ kB +no +will not hold", result.out)
    assert "2 cells: 2 no" in result.out


def test_a_wrong_file_is_refused_with_line_and_key(portllm, folder):
    (folder / "fleet.toml").write_text((folder / "fleet.toml").read_text().replace("dtype", "dtyp"))
    result = portllm("fleet", folder / "fleet.toml")
    assert result.status == 1
    assert "line 8, merge.dtyp: unknown key. Did you mean dtype?" in result.err
