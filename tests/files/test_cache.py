"""Where the cache lies."""

from pathlib import Path

import pytest

from portllm.files.cache import cache_root


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for variable in ("PORTLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_programs_own_variable_comes_first(monkeypatch):
    monkeypatch.setenv("PORTLLM_CACHE", "/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_root() == Path("/somewhere")


def test_a_relative_or_home_place_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PORTLLM_CACHE", "here")
    assert cache_root() == tmp_path / "here"
    monkeypatch.setenv("PORTLLM_CACHE", "~/there")
    assert cache_root() == tmp_path / "there"


def test_the_desktops_variable_comes_second(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_root() == Path("/elsewhere/portllm")


@pytest.mark.parametrize("other", [None, "", "relative"])
def test_the_home_folder_comes_last(monkeypatch, tmp_path, other):
    if other is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", other)
        monkeypatch.setenv("PORTLLM_CACHE", "")
    assert cache_root() == tmp_path / ".cache" / "portllm"
