"""`port` with several patches: one table or one list, and a failure that stops nothing else."""

import json
import shutil

import pytest


@pytest.fixture
def team(tiny, tmp_path):
    """A folder of two adapters that fit and one that does not."""
    other = tiny("adapter", of=tiny("base", inner=24))
    for name, adapter in (("a", tiny("adapter")), ("b", other), ("c", tiny("adapter", seed=5))):
        shutil.copytree(adapter, tmp_path / "team" / name)
    return tmp_path / "team"


@pytest.fixture
def port_team(portllm, tiny, team, tmp_path):
    def run(*more):
        models = ("--base", tiny("base"), "--evolved", tiny("evolved"))
        return portllm("port", team, *models, "-o", tmp_path / "out", *more)

    return run


def test_those_that_fit_are_ported_the_other_is_named_and_the_status_is_one(port_team, tmp_path, team):
    result = port_team()
    assert result.status == 1
    assert "Ported 2 of 3 patches" in result.out
    assert f"{team / 'b'}: model.layers.0.mlp.down_proj: the delta is (out=12, in=24)" in result.out
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == ["a", "c"]


def test_each_patch_is_what_it_is_when_it_is_ported_alone(port_team, portllm, tiny, team, tmp_path):
    port_team()
    models = ("--base", tiny("base"), "--evolved", tiny("evolved"))
    portllm("port", team / "c", *models, "-o", tmp_path / "alone")
    for file in (tmp_path / "alone").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / "c" / file.name).read_bytes()


def test_as_json_it_is_a_list_in_the_order_of_the_patches(port_team, team, tmp_path):
    result = port_team("--json")
    rows = json.loads(result.out)
    assert [row["patch"] for row in rows] == [str(team / name) for name in "abc"]
    assert [sorted(row) for row in rows] == [
        ["output", "patch", "record"],
        ["error", "patch"],
        ["output", "patch", "record"],
    ]
    assert rows[0]["output"] == str(tmp_path / "out" / "a")


def test_a_dry_run_writes_nothing(port_team, tmp_path):
    result = port_team("--dry-run")
    assert "Would port 2 of 3 patches" in result.out
    assert not (tmp_path / "out").exists()


def test_the_models_are_read_once_for_all_patches(port_team, monkeypatch):
    import portllm.matching.update

    identified = []
    identify = portllm.matching.update.identify
    monkeypatch.setattr(
        "portllm.matching.update.identify", lambda model: identified.append(model.name) or identify(model)
    )
    port_team()
    assert len(identified) == len(set(identified)) == 2
