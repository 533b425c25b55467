"""GGUF files of every architecture as checkpoints: names against the `gguf` package's map, values against its own."""

from pathlib import Path

import numpy as np
import pytest
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

from portllm.checkpoint.gguf.tensors import architectures
from portllm.checkpoint.model.identity import digest, fingerprint
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError, MissingTensorError, NotFoundError
from portllm.running.folder import check_runnable
from portllm.tensors.tensors import load
from tests.quantized import write_gguf
from tests.tiny_gguf import write_tiny_gguf

ALL = sorted(architectures())


@pytest.mark.parametrize("name", ALL)
def test_names_are_those_that_llama_cpp_maps_from(name):
    number = next(number for number, title in MODEL_ARCH_NAMES.items() if title == name)
    theirs = get_tensor_name_map(MODEL_ARCH(number), 1)
    architecture = architectures()[name]
    for source, rule in architecture.outer.items():
        stem, _, leaf = source.rpartition(".")
        assert theirs.get_name(rule.name.removesuffix(f".{leaf}")) == stem
    for source, rule in architecture.layer.items():
        stem, _, leaf = source.rpartition(".")
        assert theirs.get_name("model.layers.0." + rule.name.removesuffix(f".{leaf}")) == f"blk.0.{stem}"


@pytest.mark.parametrize("storage", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize("name", ALL)
def test_every_weight_is_the_one_that_was_written(tmp_path, name, storage):
    weights = write_gguf(tmp_path / "m.gguf", name, storage=storage)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert list(checkpoint.infos) == sorted(weights)
    for key, values in weights.items():
        assert load(checkpoint.info(key)).float().numpy().tobytes() == values.tobytes(), key


@pytest.mark.parametrize("name", ALL)
def test_its_family_is_known_and_its_head_is_tied(tmp_path, name):
    write_gguf(tmp_path / "m.gguf", name)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.family is not None
    assert checkpoint.tied_embedding.name == "model.embed_tokens.weight"
    assert checkpoint.quantization == "Q8_0"


def test_a_head_of_its_own_is_not_tied(tmp_path):
    write_tiny_gguf(tmp_path / "m.gguf", untied=True)
    assert open_checkpoint(tmp_path / "m.gguf").tied_embedding is None


def test_the_table_is_what_the_installed_packages_say():
    from scripts.gen_gguf import OUT, render

    assert OUT.read_text(encoding="utf-8") == render()


def test_an_architecture_whose_values_are_not_known_is_refused_with_that_reason(tmp_path):
    write_gguf(tmp_path / "m.gguf", metadata={"falcon.block_count": 2}, title="falcon")
    with pytest.raises(CheckpointError, match="architecture is 'falcon'.*did to the values of another one"):
        open_checkpoint(tmp_path / "m.gguf")


def test_the_page_names_every_architecture():
    page = (Path(__file__).parents[3] / "docs" / "quantized.md").read_text(encoding="utf-8")
    assert [name for name in ALL if f"`{name}`" not in page] == []


def test_a_folder_that_holds_one_file_is_the_file(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    assert fingerprint(open_checkpoint(tmp_path)) == fingerprint(open_checkpoint(tmp_path / "m.gguf"))
    (tmp_path / "n.gguf").write_bytes(b"")
    with pytest.raises(NotFoundError, match="contains 2 GGUF files"):
        open_checkpoint(tmp_path)


def test_an_identity_is_that_of_the_stored_bytes(tmp_path):
    write_gguf(tmp_path / "a.gguf", storage="Q8_0")
    write_gguf(tmp_path / "b.gguf", storage="Q4_0")
    a, b = (open_checkpoint(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert fingerprint(a) != fingerprint(b)
    assert digest(a) != digest(b)
    assert a.infos.keys() == b.infos.keys()


def test_files_that_mean_other_rows_by_the_same_bytes_have_other_identities(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    changed = {"head_count": 8, "head_count_kv": 4, "key_length": 4, "value_length": 4}
    write_gguf(tmp_path / "b.gguf", metadata={f"llama.attention.{key}": value for key, value in changed.items()})
    assert fingerprint(open_checkpoint(tmp_path / "a.gguf")) != fingerprint(open_checkpoint(tmp_path / "b.gguf"))


def test_a_gguf_file_is_not_run(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(NotFoundError, match="is a GGUF file"):
        check_runnable(open_checkpoint(tmp_path))


def test_what_is_not_known_is_refused_by_name(tmp_path):
    path = tmp_path / "m.gguf"
    for how, named in (
        ({"metadata": {"general.architecture": "gptneox"}}, "'gptneox'; supported: 'gemma'"),
        ({"tensors": {"blk.0.attn_q.bias": np.zeros(48, np.float32)}}, "'blk.0.attn_q.bias'"),
    ):
        write_tiny_gguf(path, **how)
        with pytest.raises(CheckpointError, match=named):
            open_checkpoint(path)
    write_tiny_gguf(path, tensors={"output_norm.weight": None})
    with pytest.raises(MissingTensorError, match=r"'output_norm\.weight'"):
        open_checkpoint(path)


def test_what_follows_from_the_configuration_is_left_out(tmp_path):
    write_tiny_gguf(tmp_path / "m.gguf", tensors={"rope_freqs.weight": np.ones(6, np.float32)})
    assert not [name for name in open_checkpoint(tmp_path / "m.gguf").infos if "rope" in name]
