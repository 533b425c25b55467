"""What the tests of the pipeline share: a cache of their own, so that no digest is left with the user."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PORTLLM_CACHE", str(folder))
    return folder
