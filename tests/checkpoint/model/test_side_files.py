"""The files beside the weights: which are copied, and how the configuration changes."""

import json

import pytest

from portllm.checkpoint.model.side_files import copy_side_files, side_files
from portllm.errors import CheckpointError
from tests.safetensors_files import contents

COPIED = {
    "config.json": b'{"b":1,  "a":2}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"binary\xff",
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"x",
    "LICENSE": b"x",
    "modeling_custom.py": b"x",
}
LEFT = (
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "rust_model.ot.npz",
    "tf_model.h5",
    "flax_model.msgpack",
    "model.gguf",
    "README.md",
    "portllm.json",
    ".gitattributes",
)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "original").mkdir(parents=True)
    (folder / "original" / "params.json").write_text("{}")
    for name, content in COPIED.items():
        (folder / name).write_bytes(content)
    for name in LEFT:
        (folder / name).write_bytes(b"")
    return folder


@pytest.fixture
def target(tmp_path):
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def test_what_belongs_to_the_architecture_is_copied_and_weights_are_not(source, target):
    copy_side_files(source, target, config_changes={})
    assert contents(target) == COPIED
    assert [file.name for file in side_files(source)] == sorted(COPIED)


def test_a_changed_configuration_keeps_the_other_fields_and_their_order(source, target):
    (source / "config.json").write_text('{"z": "größer", "tie_word_embeddings": true, "a": [1]}', encoding="utf-8")
    copy_side_files(source, target, config_changes={"tie_word_embeddings": False, "dtype": "float32"})
    text = (target / "config.json").read_text(encoding="utf-8")
    assert "größer" in text
    assert list(json.loads(text).items()) == [
        ("z", "größer"),
        ("tie_word_embeddings", False),
        ("a", [1]),
        ("dtype", "float32"),
    ]
    assert "true" in (source / "config.json").read_text(encoding="utf-8")


def test_the_dtype_goes_under_the_name_that_the_file_uses(source, target):
    (source / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    copy_side_files(source, target, config_changes={"dtype": "float16"})
    assert json.loads((target / "config.json").read_text()) == {"torch_dtype": "float16"}


def test_a_model_without_configuration_gets_none(source, target):
    (source / "config.json").unlink()
    copy_side_files(source, target, config_changes={"dtype": "float16"})
    assert "config.json" not in contents(target)


def test_a_configuration_that_is_damaged_is_an_error(source, target):
    (source / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must contain a JSON object"):
        copy_side_files(source, target, config_changes={"dtype": "float16"})


def test_a_link_out_of_the_folder_is_not_followed_into_the_output(source, target, tmp_path):
    (tmp_path / "id_rsa").write_text("secret")
    (source / "notes.txt").symlink_to("../id_rsa")
    with pytest.raises(CheckpointError, match=r"notes\.txt': is a link to '.*id_rsa', outside its folder"):
        copy_side_files(source, target, config_changes={})
    assert contents(target) == {}


def test_a_link_inside_the_folder_is_followed(source, target):
    (source / "config.json").rename(source / "original" / "kept.json")
    (source / "config.json").symlink_to("original/kept.json")
    copy_side_files(source, target, config_changes={})
    assert contents(target) == COPIED


def test_the_links_of_the_hubs_cache_are_followed_and_no_others(source, target, tmp_path):
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    snapshot = source.rename(cache / "snapshots" / ("0" * 40))
    for name in COPIED:
        (snapshot / name).rename(cache / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    copy_side_files(snapshot, target, config_changes={})
    assert contents(target) == COPIED
    (tmp_path / "secret").write_text("secret")
    (cache / "blobs" / "LICENSE").unlink()
    (cache / "blobs" / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="LICENSE': is a link to"):
        side_files(snapshot)


def test_an_infinity_in_the_configuration_stays_what_it_is(source, target):
    (source / "config.json").write_text('{"time_step_limit": [0.0, Infinity], "dtype": "float32"}')
    copy_side_files(source, target, config_changes={"dtype": "bfloat16"})
    assert json.loads((target / "config.json").read_text()) == {
        "time_step_limit": [0.0, float("inf")],
        "dtype": "bfloat16",
    }
