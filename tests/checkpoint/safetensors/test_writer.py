"""Writing: the layout, the index as transformers expects it, and nothing under a final name before it is whole."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from portllm.checkpoint.open import open_checkpoint
from portllm.checkpoint.safetensors.names import INDEX_FILE
from portllm.checkpoint.safetensors.writer import Entry, ShardWriter, lay_out, render_index, write_index
from portllm.errors import OutputError, OutputExistsError
from portllm.files import page_cache
from portllm.files.input_file import local_file
from portllm.files.output_folder import check_apart, check_free, staged_folder
from portllm.tensors.bytes import read_bytes
from portllm.tensors.info import DTYPE_BITS
from tests.safetensors_files import contents


def test_by_hand_one_file_holds_all_with_wide_values_first():
    entries = {name: Entry(name, dtype, (3,)) for name, dtype in (("c", "F32"), ("a", "BF16"), ("b", "U8"))}
    (shard,) = lay_out(entries, shard_bytes=21)
    assert shard.file == "model.safetensors"
    assert [entry.name for entry in shard.entries] == ["c", "a", "b"]
    assert render_index((shard,)) is None


def test_by_hand_a_large_tensor_has_a_file_of_its_own():
    entries = {name: Entry(name, "U8", (size,)) for name, size in (("a", 1), ("b", 9), ("c", 2), ("d", 3))}
    shards = lay_out(entries, shard_bytes=5)
    assert [[entry.name for entry in shard.entries] for shard in shards] == [["a"], ["b"], ["c", "d"]]
    assert [shard.file for shard in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


def test_no_tensor_makes_one_empty_file():
    (shard,) = lay_out({})
    assert (shard.file, shard.entries) == ("model.safetensors", ())


sizes = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    st.tuples(st.sampled_from(["F32", "BF16", "U8"]), st.lists(st.integers(0, 6), max_size=3).map(tuple)),
    max_size=8,
)


@given(sizes, st.integers(1, 200), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_layout_holds_each_tensor_once_in_small_files_whatever_the_order(sizes, shard_bytes, shuffler):
    entries = {name: Entry(name, dtype, shape) for name, (dtype, shape) in sizes.items()}
    shards = lay_out(entries, shard_bytes=shard_bytes)
    names = [entry.name for shard in shards for entry in shard.entries]
    assert sorted(names) == sorted(entries)
    by_file = [sorted(entry.name for entry in shard.entries) for shard in shards]
    assert [name for group in by_file for name in group] == sorted(entries)
    for shard in shards:
        assert len(shard.entries) == 1 or sum(entry.n_bytes for entry in shard.entries) <= shard_bytes
        widths = [DTYPE_BITS[entry.dtype] for entry in shard.entries]
        assert widths == sorted(widths, reverse=True)
        assert len(shard.header) % 8 == 0
    shuffled = list(entries)
    shuffler.shuffle(shuffled)
    assert lay_out({name: entries[name] for name in shuffled}, shard_bytes=shard_bytes) == shards


@pytest.fixture
def rewritten(tiny, tmp_path):
    """A tiny model written again by this program, in many shards."""
    source = open_checkpoint(tiny("base"))
    entries = {name: Entry(name, info.dtype, info.shape) for name, info in source.infos.items()}
    shards = lay_out(entries, shard_bytes=1000)
    folder = tmp_path / "rewritten"
    with staged_folder(folder, overwrite=False) as staging:
        for shard in shards:
            with ShardWriter(staging, shard) as writer:
                for entry in shard.entries:
                    writer.append(read_bytes(source.infos[entry.name]))
        write_index(staging, shards)
        (staging / "config.json").write_bytes((source.folder / "config.json").read_bytes())
    return folder


def test_the_library_reads_what_was_written(rewritten, tiny):
    theirs = tiny("base") / "model.safetensors"
    index = json.loads((rewritten / INDEX_FILE).read_text())
    with safe_open(theirs, "pt") as opened:
        names = list(opened.keys())
        assert set(index["weight_map"]) == set(names)
        assert index["metadata"]["total_size"] == sum(opened.get_tensor(name).nbytes for name in names)
        for name in names:
            with safe_open(rewritten / index["weight_map"][name], "pt") as shard:
                assert shard.metadata() == {"format": "pt"}
                assert shard.get_tensor(name).equal(opened.get_tensor(name))


def test_transformers_loads_what_was_written(rewritten, tiny):
    from transformers import LlamaForCausalLM

    from tests.models import logits

    assert len(list(rewritten.glob("model-*.safetensors"))) > 2
    ours, theirs = (LlamaForCausalLM.from_pretrained(folder, dtype="auto") for folder in (rewritten, tiny("base")))
    assert logits(ours).equal(logits(theirs))


@pytest.mark.parametrize("size", [3, 5])
def test_a_file_with_other_bytes_than_promised_is_an_error(size, tmp_path):
    (shard,) = lay_out({"w": Entry("w", "U8", (4,))})
    message = r"model\.safetensors': \d+ bytes were written, but its header declares"
    with pytest.raises(OutputError, match=message), ShardWriter(tmp_path, shard) as writer:
        writer.append(bytes(size))


def test_views_of_any_kind_are_appended_as_bytes(tmp_path):
    (shard,) = lay_out({"w": Entry("w", "I32", (2,))})
    with ShardWriter(tmp_path, shard) as writer:
        writer.append(memoryview(b"").cast("B"))
        writer.append(memoryview(bytes(range(8))).cast("i"))
    assert (tmp_path / "model.safetensors").read_bytes() == shard.header + bytes(range(8))


def fill(folder, *, overwrite=False, fail=None, text="new"):
    with staged_folder(folder, overwrite=overwrite) as staging:
        (staging / "file").write_text(text)
        assert not folder.exists() or contents(folder) == OLD
        if fail is not None:
            raise fail


OLD = {"file": b"old", "patch.json": b"{}"}


def old(folder):
    folder.mkdir(parents=True)
    (folder / "file").write_text("old")
    (folder / "patch.json").write_text("{}")
    return folder


def test_the_folder_appears_at_the_end_beside_nothing_else(tmp_path):
    fill(tmp_path / "made" / "on" / "the way")
    assert contents(tmp_path) == {"made/on/the way/file": b"new"}
    assert os.listdir(tmp_path / "made" / "on") == ["the way"]


def test_the_folder_is_as_readable_as_any_other(tmp_path):
    fill(tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failure", [ValueError("bug"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_what_was_there_and_no_more(failure, overwrite, tmp_path):
    folder = tmp_path / "out"
    if overwrite:
        old(folder)
    before = contents(tmp_path)
    with pytest.raises(type(failure)):
        fill(folder, overwrite=overwrite, fail=failure)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == (["out"] if overwrite else [])


def test_a_full_disk_is_told_as_an_error_of_the_output(tmp_path):
    with pytest.raises(OutputError, match="could not be written: No space left on device. Nothing was left behind"):
        fill(tmp_path / "out", fail=OSError(28, "No space left on device"))
    assert os.listdir(tmp_path) == []


def test_overwriting_replaces_the_whole_folder(tmp_path):
    folder = old(tmp_path / "out")
    (folder / "left from before").write_text("")
    with staged_folder(folder, overwrite=True) as staging:
        (staging / "file").write_text("new")
        assert (folder / "left from before").exists()
    assert contents(tmp_path) == {"out/file": b"new"}


def test_a_rename_that_fails_gives_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr("portllm.files.staging.exchange", lambda *_: False)
    folder = old(tmp_path / "out")
    rename = Path.rename

    def fail_once(path, to):
        if path.name.endswith(".part"):
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OutputError, match="Input/output error"):
        fill(folder, overwrite=True)
    assert contents(tmp_path) == {f"out/{name}": data for name, data in OLD.items()}


def test_an_output_that_exists_is_refused_and_untouched(tmp_path):
    folder = old(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="already exists. Choose another path, or pass --overwrite"):
        fill(folder)
    assert contents(tmp_path) == {f"out/{name}": data for name, data in OLD.items()}


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(OutputExistsError), staged_folder(tmp_path / "out", overwrite=False):
        old(tmp_path / "out")
    assert contents(tmp_path) == {f"out/{name}": data for name, data in OLD.items()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_at_the_outputs_place_is_never_replaced(overwrite, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputExistsError):
        fill(tmp_path / "out", overwrite=overwrite)
    with pytest.raises(OutputExistsError):
        check_free(tmp_path / "out", overwrite=overwrite)
    assert contents(tmp_path) == {"out": b"mine"}


def test_a_parent_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot write into"):
        fill(tmp_path / "file" / "out")
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_parent_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # a user who may do anything is not stopped by the folder's mode
    with pytest.raises(OutputError, match=r"cannot write into '.*': Permission denied"):
        fill(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_holds_what_is_read_is_refused(tmp_path):
    file = old(tmp_path / "model") / "file"
    link = tmp_path / "snapshot" / "link"
    link.parent.mkdir()
    link.symlink_to(file)
    for out in (tmp_path, tmp_path / "model", tmp_path / "x" / ".." / "model"):
        with pytest.raises(OutputError, match=r"which is an input\. Write to another folder"):
            check_apart(out, [local_file(file)])
    for out in (tmp_path / "model", tmp_path / "snapshot"):
        with pytest.raises(OutputError, match="link"):
            check_apart(out, [local_file(link)])
    for out in (tmp_path / "model" / "out", tmp_path / "mod", tmp_path / "snapshot"):
        check_apart(out, [local_file(file)])


def test_tensors_are_written_in_parts_and_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(page_cache, "STEP_BYTES", 3)
    (shard,) = lay_out({"a": Entry("a", "U8", (4,)), "b": Entry("b", "U8", (6,))})
    with ShardWriter(tmp_path, shard, keep_cached=False) as writer:
        writer.write("b", 2, bytes([6, 7, 8, 9]))
        writer.write("a", 0, bytes([0, 1, 2, 3]))
        writer.write("b", 0, bytes([4, 5]))
    assert (tmp_path / "model.safetensors").read_bytes() == shard.header + bytes(range(10))
