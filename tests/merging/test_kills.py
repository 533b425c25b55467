"""Merges and undos that are killed at random moments: nothing is lost, nothing is left, and all can be finished.

`PORTLLM_KILLS` says how many kills, with other moments each time; by default a hundred of each kind, at the same ones.
"""

import os
import random
import shutil
import time
from contextlib import suppress

import pytest

from portllm.checkpoint.model.unfinished import UNFINISHED_FILE as MARK
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError, OutputError, PlanRefusedError
from portllm.merging.in_place import merge_in_place, undo_merge
from portllm.merging.merge import merge
from portllm.merging.options import MergeOptions
from portllm.patch.adapter_folder import load_patch
from tests.processes import killed_after
from tests.safetensors_files import contents

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

KILLS = int(os.environ.get("PORTLLM_KILLS", "300"))
SHARD_BYTES = 3000


@pytest.fixture
def moments():
    return random.Random(None if "PORTLLM_KILLS" in os.environ else 13)


@pytest.fixture
def patch(tiny):
    return load_patch(tiny("adapter"))


@pytest.fixture
def told(request, capsys):
    """Says at the end how many kills there were."""
    counts = {"killed": 0, "ran to its end": 0}
    yield counts
    with capsys.disabled():
        print(f"\n{request.node.name}: {counts}")  # noqa: T201


def kill(work, moments, told, longest):
    """Runs `work` in a child, which is perhaps killed, and counts."""
    was_killed = killed_after(moments.uniform(1e-4, longest), work)
    told["killed" if was_killed else "ran to its end"] += 1
    return was_killed


def duration_of(work):
    began = time.perf_counter()
    assert not killed_after(600, work)
    return time.perf_counter() - began


def test_a_merge_that_is_killed_leaves_the_old_or_the_new_and_the_next_finishes(patch, tiny, tmp_path, moments, told):
    base = shutil.copytree(tiny("base"), tmp_path / "base")
    into, place = open_checkpoint(base), tmp_path / "place"

    def run(folder, patch=patch):
        merge(patch, into=into, out=folder / "out", options=MergeOptions(shard_bytes=SHARD_BYTES), overwrite=True)

    run(tmp_path / "old", load_patch(tiny("adapter", seed=5)))
    longest = duration_of(lambda: run(tmp_path / "new"))
    old, new, before = contents(tmp_path / "old"), contents(tmp_path / "new"), contents(base)
    while told["killed"] < KILLS // 3:
        shutil.copytree(tmp_path / "old", place)
        while kill(lambda: run(place), moments, told, longest) and moments.random() < 0.5:
            assert {name: data for name, data in contents(place).items() if name.startswith("out/")} in (old, new)
        run(place)
        assert contents(place) == new
        assert os.listdir(place) == ["out"]
        assert contents(base) == before
        shutil.rmtree(place)


@pytest.mark.parametrize("way", ["in place", "undo"])
def test_what_is_killed_in_place_can_be_finished_and_taken_back_bit_for_bit(way, patch, tiny, tmp_path, moments, told):
    model = shutil.copytree(tiny("base", max_shard_size="3KB"), tmp_path / "model")
    plain = shutil.copytree(model, tmp_path / "plain")
    merge_in_place(patch, model)
    merged = shutil.copytree(model, tmp_path / "merged")
    before, after = contents(plain), contents(merged)
    start, work = {
        "in place": (plain, lambda: merge_in_place(patch, model)),
        "undo": (merged, lambda: undo_merge(model)),
    }[way]
    shutil.rmtree(model)
    shutil.copytree(start, model)
    longest = duration_of(work)
    while told["killed"] < KILLS // 3:
        shutil.rmtree(model)
        shutil.copytree(start, model)
        while kill(work, moments, told, longest) and (model / MARK).exists() and moments.random() < 0.5:
            with pytest.raises(CheckpointError, match="was interrupted"):
                open_checkpoint(model)
        if not (model / MARK).exists():
            assert weights(contents(model)) in (weights(before), weights(after))
        if moments.random() < 0.5:
            with suppress(PlanRefusedError):  # it is done, and can be taken back
                merge_in_place(patch, model)
            assert weights(contents(model)) == weights(after)
        with suppress(OutputError):  # there is nothing to take back
            undo_merge(model)
        assert contents(model) == before


def weights(found):
    return {name: data for name, data in found.items() if name.endswith(".safetensors") and "/" not in name}
