"""Opening a model: what is read, what is not, and what is refused."""

import json
import os
import shutil

import pytest
from safetensors import safe_open

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.identity import digest
from portllm.checkpoint.open import open_checkpoint
from portllm.checkpoint.safetensors.names import INDEX_FILE
from portllm.errors import (
    AdapterFormatError,
    CheckpointError,
    HeaderError,
    IndexFileError,
    InputChangedError,
    MissingShardError,
    MissingTensorError,
    NotFoundError,
)
from portllm.files import json_file
from portllm.files.json_file import read_json
from portllm.files.source import LocalFile
from portllm.patch.adapter_folder import load_patch
from portllm.tensors import bytes as raw_files
from portllm.tensors.bytes import read_bytes
from tests.safetensors_files import file_bytes, rewrite_header, write_tensors

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TENSORS = {
    "model.layers.0.mlp.up_proj.weight": ("F32", (2, 3), bytes(range(24))),
    "model.embed_tokens.weight": ("BF16", (5, 2), bytes(range(100, 120))),
    "model.norm.weight": ("F16", (2,), b"abcd"),
}


@pytest.fixture
def sharded(tmp_path):
    """A folder with two shards, the first two tensors in the first of them."""
    names = list(TENSORS)
    write_tensors(tmp_path / SHARDS[0], {name: TENSORS[name] for name in names[:2]}, metadata={"format": "pt"})
    write_tensors(tmp_path / SHARDS[1], {names[2]: TENSORS[names[2]]})
    write_index(tmp_path, dict(zip(names, [SHARDS[0], SHARDS[0], SHARDS[1]], strict=True)))
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def mapped(folder):
    return json.loads((folder / INDEX_FILE).read_text())["weight_map"]


def stored(checkpoint: Checkpoint):
    return {name: (info.dtype, info.shape, read_bytes(info)) for name, info in checkpoint.infos.items()}


def test_a_folder_with_shards_holds_all_their_tensors_sorted_by_name(sharded):
    opened = open_checkpoint(sharded)
    assert stored(opened) == TENSORS
    assert list(opened.infos) == sorted(TENSORS)
    assert [file.name for file in opened.files] == list(SHARDS)
    assert (opened.n_bytes, opened.n_params) == (24 + 20 + 4, 6 + 10 + 2)
    assert opened.folder == sharded
    assert opened.config == {}


def test_a_folder_with_one_file_and_the_file_alone_hold_the_same(tmp_path):
    file = write_tensors(tmp_path / "model.safetensors", TENSORS, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    folder, alone = open_checkpoint(tmp_path), open_checkpoint(str(file))
    assert stored(folder) == stored(alone) == TENSORS
    assert (folder.config, alone.config) == ({"tie_word_embeddings": True}, {})
    assert (folder.name, alone.name) == (str(tmp_path), str(file))
    assert alone.folder is None
    assert folder.metadata == alone.metadata == {"format": "pt"}


@pytest.mark.parametrize("size", ["1GB", "3KB"])
def test_a_model_written_by_transformers_is_read_as_the_library_reads_it(size, tiny):
    folder = tiny("base", max_shard_size=size)
    opened = open_checkpoint(folder)
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as theirs:
            for name in theirs.keys():  # noqa: SIM118 (not a mapping)
                piece = theirs.get_slice(name)
                assert (opened.infos[name].dtype, list(opened.infos[name].shape)) == (
                    piece.get_dtype(),
                    piece.get_shape(),
                )
                found.add(name)
    assert found == set(opened.infos)
    assert len(opened.files) == (1 if size == "1GB" else len(list(folder.glob("*.safetensors"))))


def test_opening_reads_no_byte_of_a_tensor(sharded, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("bytes of a tensor were read")

    monkeypatch.setattr(os, "pread", refuse)
    monkeypatch.setattr(raw_files, "read_bytes", refuse)
    assert len(open_checkpoint(sharded).infos) == 3


def test_a_part_of_a_tensor_is_read_from_its_place(sharded):
    info = open_checkpoint(sharded).infos["model.embed_tokens.weight"]
    assert read_bytes(info, 3, 7) == bytes(range(103, 107))
    assert read_bytes(info, 4) == bytes(range(104, 120))
    assert read_bytes(info, 20, 20) == b""


def test_short_reads_are_put_together(sharded, monkeypatch):
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, position: whole(fd, min(count, 5), position))
    assert stored(open_checkpoint(sharded)) == TENSORS


def test_a_missing_tensor_is_named_with_those_that_end_alike(sharded):
    opened = open_checkpoint(sharded)
    assert opened.info("model.norm.weight").shape == (2,)
    with pytest.raises(
        MissingTensorError, match=r"'norm.weight': .* has no such tensor among its 3. Similar names: model.norm.weight."
    ):
        opened.info("norm.weight")
    with pytest.raises(MissingTensorError, match=r"'x': .* has no such tensor among its 3\.$"):
        opened.info("x")


def unmap(name, shard):
    def change(folder):
        write_index(folder, {**mapped(folder), name: shard})

    return change


NORM = "model.norm.weight"
WRONG_INDEX = {
    "absolute path": (unmap(NORM, f"/tmp/{SHARDS[1]}"), IndexFileError, f"tensor '{NORM}' is mapped to '/tmp"),
    "path out of the folder": (
        unmap(NORM, f"../{SHARDS[1]}"),
        IndexFileError,
        f"tensor '{NORM}' .* is not the name of a .safetensors file",
    ),
    "path into a subfolder": (
        unmap(NORM, f"a/{SHARDS[1]}"),
        IndexFileError,
        f"tensor '{NORM}' .* is not the name of a .safetensors file",
    ),
    "the folder above": (
        unmap(NORM, ".."),
        IndexFileError,
        f"tensor '{NORM}' .* is not the name of a .safetensors file",
    ),
    "a pickle": (
        unmap(NORM, "pytorch_model.bin"),
        IndexFileError,
        f"tensor '{NORM}' .* is not the name of a .safetensors file",
    ),
    "an empty name": (unmap(NORM, ""), IndexFileError, f"tensor '{NORM}' .* is not the name of a .safetensors file"),
    "a number": (unmap(NORM, 1), IndexFileError, f"tensor '{NORM}' is mapped to 1"),
    "a shard that is not there": (
        unmap(NORM, "model-00003-of-00003.safetensors"),
        MissingShardError,
        "1 of 2 shards are missing, first 'model-00003-of-00003.safetensors'",
    ),
    "a tensor in another shard": (unmap(NORM, SHARDS[0]), IndexFileError, f"1 tensors are in no shard, first '{NORM}'"),
    "a tensor of another shard": (
        unmap("model.embed_tokens.weight", SHARDS[1]),
        IndexFileError,
        f"'model.embed_tokens.weight' is in '{SHARDS[0]}', but the index lists it in '{SHARDS[1]}'",
    ),
    "a tensor in no shard": (unmap("ghost", SHARDS[1]), IndexFileError, "1 tensors are in no shard, first 'ghost'"),
    "an empty map": (lambda folder: write_index(folder, {}), IndexFileError, "has no 'weight_map'"),
    "a map that is a list": (lambda folder: write_index(folder, []), IndexFileError, "has no 'weight_map'"),
    "no map": (lambda folder: (folder / INDEX_FILE).write_text("{}"), IndexFileError, "has no 'weight_map'"),
    "no object": (lambda folder: (folder / INDEX_FILE).write_text("[]"), IndexFileError, "not a list"),
    "no JSON": (lambda folder: (folder / INDEX_FILE).write_text("{"), IndexFileError, "is not valid JSON"),
    "bad UTF-8": (lambda folder: (folder / INDEX_FILE).write_bytes(b'"\xff"'), IndexFileError, "is not valid JSON"),
    "deep nesting": (lambda folder: (folder / INDEX_FILE).write_text("[" * 200_000), IndexFileError, "not valid JSON"),
    "a missing shard": (lambda folder: (folder / SHARDS[0]).unlink(), MissingShardError, f"first '{SHARDS[0]}'"),
    "a damaged shard": (
        lambda folder: (folder / SHARDS[1]).write_bytes(file_bytes({})[:-1]),
        HeaderError,
        SHARDS[1],
    ),
    "a shard that is a folder": (
        lambda folder: ((folder / SHARDS[1]).unlink(), (folder / SHARDS[1]).mkdir()),
        MissingShardError,
        SHARDS[1],
    ),
}


@pytest.mark.parametrize("what", WRONG_INDEX)
def test_an_index_that_does_not_fit_the_shards_is_refused(what, sharded):
    change, kind, message = WRONG_INDEX[what]
    change(sharded)
    with pytest.raises(kind, match=message):
        open_checkpoint(sharded)


def test_a_tensor_that_two_shards_hold_is_refused(sharded):
    content = (sharded / SHARDS[1]).read_bytes()
    rewrite_header(sharded / SHARDS[1], lambda entries: {"model.embed_tokens.weight": next(iter(entries.values()))})
    write_index(sharded, {name: shard for name, shard in mapped(sharded).items() if name != NORM})
    (sharded / "model-00003-of-00003.safetensors").write_bytes(content)
    write_index(sharded, {**mapped(sharded), NORM: "model-00003-of-00003.safetensors", "x": SHARDS[1]})
    with pytest.raises(IndexFileError, match=f"'model.embed_tokens.weight' is in '{SHARDS[1]}'"):
        open_checkpoint(sharded)


def test_a_tensor_that_the_index_does_not_list_belongs_to_the_model(sharded):
    whole = open_checkpoint(sharded)
    write_index(
        sharded, {name: shard for name, shard in mapped(sharded).items() if name != "model.embed_tokens.weight"}
    )
    assert digest(open_checkpoint(sharded)) == digest(whole)


def test_a_config_that_is_not_an_object_is_refused(sharded):
    (sharded / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json': must contain a JSON object"):
        open_checkpoint(sharded)


def test_a_json_file_that_is_too_large_is_not_read(sharded, monkeypatch):
    with pytest.raises(IndexFileError, match="the limit is 10"):
        read_json(sharded / INDEX_FILE, error=IndexFileError, most=10)
    monkeypatch.setattr(json_file, "MAX_JSON_VALUES", 2)
    with pytest.raises(IndexFileError, match="contains more than 2 values"):
        read_json(sharded / INDEX_FILE, error=IndexFileError)


@pytest.mark.parametrize("name", ["a" * 5000, "org/" + "a" * 5000, "a" * 300 + "/b", "org/name@" + "x" * 5000, "a\0b"])
@pytest.mark.parametrize("opener", [open_checkpoint, load_patch])
def test_a_name_that_no_system_has_is_told_and_cut_short(opener, name):
    with pytest.raises((NotFoundError, AdapterFormatError), match="no such f") as told:
        opener(name)
    assert len(str(told.value)) < 500


def test_one_shard_alone_is_refused(sharded):
    with pytest.raises(CheckpointError, match=r"is one shard of a model. Pass the folder"):
        open_checkpoint(sharded / SHARDS[0])


def test_a_single_file_of_another_kind_is_refused(tmp_path):
    shutil.copyfile(write_tensors(tmp_path / "a.safetensors", TENSORS), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code and is never read"):
        open_checkpoint(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_folder_with_pickles_alone_is_refused_with_the_way_out(pickled, tmp_path):
    (tmp_path / pickled).write_bytes(b"")
    with pytest.raises(NotFoundError, match=r"never read. Convert the model once.*save_pretrained"):
        open_checkpoint(tmp_path)


def test_an_adapter_given_as_a_model_is_said_to_be_one(tiny):
    with pytest.raises(NotFoundError, match="is an adapter, not a model"):
        open_checkpoint(tiny("adapter"))


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(NotFoundError, match=r"contains neither model.safetensors nor model.safetensors.index.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["org/some-model", "org/some-model@v1.0"])
def test_offline_a_model_of_the_hub_that_is_not_in_its_cache_is_not_found(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match=r"HF_HUB_OFFLINE is set.*hf download org/some-model\.$"):
        open_checkpoint(name)


def test_a_path_in_a_folder_that_is_there_is_no_name_of_the_hub_and_gets_a_hint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    with pytest.raises(NotFoundError, match=r"no such file or folder.* write org/some-model@main\.$"):
        open_checkpoint("org/some-model")


def test_a_path_that_is_not_there_gets_no_hint_of_the_hub(tmp_path):
    with pytest.raises(NotFoundError, match=r"no such file or folder\. Pass a folder.*135m\.$"):
        open_checkpoint(tmp_path / "none")


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(sharded):
    opened = open_checkpoint(sharded)
    os.truncate(sharded / SHARDS[1], (sharded / SHARDS[1]).stat().st_size - 1)
    with pytest.raises(InputChangedError, match="changed while it was being read"):
        read_bytes(opened.infos[NORM])
    own = opened.infos[NORM].in_file(LocalFile(sharded / SHARDS[1]))
    with pytest.raises(InputChangedError, match=f"'{NORM}': .* ended at 3 of 4 bytes; it changed while it was read"):
        read_bytes(own)


def test_a_file_that_is_gone_after_it_was_opened_is_noticed(sharded):
    opened = open_checkpoint(sharded)
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"'{NORM}': cannot read .*No such file"):
        read_bytes(opened.infos[NORM])
