"""What every test can ask for: tiny checkpoints and adapters, written once in a run.

`tests.models` is imported when a fixture is first asked for and not before: transformers and peft take seconds, and a
run of the pure tests alone needs neither.
"""

import gc
import itertools
import os
import shutil
import sys
from dataclasses import dataclass

import pytest

from tests import checked, plain

gc.disable()  # what the imports make stays: see below

if plain.ASKED_FOR:
    plain.be_plain()
checked.check_types()

import torch  # noqa: E402 (it reads the processor once, when it is loaded)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes would compile what the tests run once

torch.set_num_threads(1)

CACHES = itertools.count()

os.fsync = lambda file: None  # what a killed process has written outlives it; only the machine's own death would not


def pytest_ignore_collect(collection_path):
    """On the plainest processor, files of tests that touch no numbers are left out."""
    is_file = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if plain.ASKED_FOR and is_file and not plain.touches_numbers(collection_path.read_text()) else None


def pytest_collection_finish():
    """What the imports made stays to the end: no collection goes through it again, and no forked child copies it."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder of tiny checkpoints by kind, each written when first asked for; read them, do not write to them.

    `tiny("base")`, `tiny("base", tied=False, dtype=torch.float16)`, `tiny("evolved", drift=0.1)`,
    `tiny("adapter", r=2, use_rslora=True)`: keywords as for `make_base`, `make_evolved` and `make_adapter` of
    `tests.models`. An evolved model and an adapter are of the base `of`, by default `tiny("base")`.
    """
    from tests import models

    made = {}

    def make(kind, *, of=None, **how):
        key = (kind, str(of), repr(sorted(how.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            match kind:
                case "base":
                    made[key] = models.make_base(folder, **how)
                case "evolved":
                    made[key] = models.make_evolved(of or make("base"), folder, **how)
                case "adapter":
                    made[key] = models.make_adapter(of or make("base"), folder, **how)
                case _:
                    raise ValueError(kind)
        return made[key]

    return make


@dataclass(frozen=True)
class Result:
    """What a call of the program came to."""

    status: int
    out: str
    err: str


@pytest.fixture
def portllm(monkeypatch, capsys):
    """`portllm("inspect", path)` runs a command in this process; exit status, stdout and stderr."""
    from portllm.cli.main import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["portllm", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache for each test, so that no digest is left with the user or with another test."""
    folder = tmp_path_factory.getbasetemp() / f"cache-{next(CACHES)}"
    monkeypatch.setenv("PORTLLM_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def written(tiny, tmp_path_factory):
    """A patch that was ported once, and a model that it was merged into, in several files."""
    from portllm.capturing.adapter import capture_adapter
    from portllm.checkpoint.open import open_checkpoint
    from portllm.merging.merge import merge
    from portllm.merging.options import MergeOptions
    from portllm.patch.adapter_folder import load_patch
    from portllm.porting.port import port

    folder = tmp_path_factory.mktemp("written")
    base, evolved = open_checkpoint(tiny("base")), open_checkpoint(tiny("evolved"))
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setenv("PORTLLM_CACHE", str(folder / "cache"))
        patch = capture_adapter(load_patch(tiny("adapter")), base=base, out=folder / "first")
        ported = port(patch, evolved=evolved, out=folder / "patch")
        merge(ported, into=evolved, out=folder / "merged", options=MergeOptions(shard_bytes=4000))
    return folder


@pytest.fixture
def copy(written, tmp_path):
    """A copy of one of them, to be signed or damaged."""

    def take(name="patch"):
        return shutil.copytree(written / name, tmp_path / name)

    return take


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    """Folder of a tiny bfloat16 model with a tokenizer; read it, do not write to it."""
    from tests.language import make_reader

    return make_reader(tmp_path_factory.mktemp("reader"))
