"""What the tests of the pipeline share: a cache of their own, so that no digest is left with the user."""

import shutil

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PORTLLM_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def written(tiny, tmp_path_factory):
    """A patch that was ported once, and a model that it was merged into, in several files."""
    from portllm.capturing.adapter import capture_adapter
    from portllm.checkpoint.open import open_checkpoint
    from portllm.merging.merge import merge
    from portllm.patch.adapter_folder import load_patch
    from portllm.porting.port import port

    folder = tmp_path_factory.mktemp("written")
    base, evolved = open_checkpoint(tiny("base")), open_checkpoint(tiny("evolved"))
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setenv("PORTLLM_CACHE", str(folder / "cache"))
        patch = capture_adapter(load_patch(tiny("adapter")), base=base, out=folder / "first")
        ported = port(patch, evolved=evolved, out=folder / "patch")
        merge(ported, into=evolved, out=folder / "merged", shard_bytes=4000)
    return folder


@pytest.fixture
def copy(written, tmp_path):
    """A copy of one of them, to be signed or damaged."""

    def take(name="patch"):
        return shutil.copytree(written / name, tmp_path / name)

    return take
