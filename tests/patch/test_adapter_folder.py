"""PEFT's folder, read and written: what PEFT makes of it, and everything that is refused."""

import json
import re
import shutil

import pytest
from blake3 import blake3
from msgspec import structs
from safetensors import safe_open

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import AdapterFormatError, HeaderError, PatchRecordError
from portllm.files.record import encode
from portllm.files.seal import render_sealed
from portllm.files.typed import decode
from portllm.patch.adapter_folder import (
    digest_tensors,
    files_of,
    load_patch,
    read_record,
    stored_tensors,
    write_patch,
    write_record,
)
from portllm.patch.record import Capture, ModelIdentity, PatchRecord, PortStep
from portllm.tensors.bytes import read_bytes
from tests.safetensors_files import contents, count, write_tensors

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
FACTORS = {
    f"{PREFIX}.lora_A.weight": ("F32", (2, 3), bytes(range(24))),
    f"{PREFIX}.lora_B.weight": ("BF16", (5, 2), bytes(range(100, 120))),
}


@pytest.fixture
def adapter(tmp_path):
    """Writes an adapter folder by hand."""

    def write(tensors=FACTORS, *, config=CONFIG):
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if tensors is not None:
            write_tensors(folder / "adapter_model.safetensors", tensors)
        return folder

    return write


def rewrite(patch, folder, *, base_name="base"):
    folder.mkdir()
    write_patch(folder, patch, base_name=base_name)
    return folder


def test_by_hand_an_adapter_is_a_delta_with_its_scale(adapter):
    patch = load_patch(adapter())
    assert list(patch.deltas) == ["model.layers.0.self_attn.q_proj"]
    (delta,) = patch.deltas.values()
    assert (delta.rank, delta.shape, delta.scale, delta.n_params) == (2, (5, 3), 3.0, 16)
    assert (read_bytes(delta.a), read_bytes(delta.b)) == tuple(data for _, _, data in FACTORS.values())
    assert (patch.n_params, patch.record, patch.base_copies) == (16, None, {})
    (file,) = files_of(patch)
    assert file.path == adapter() / "adapter_model.safetensors"
    assert [other.name for other in file.described_by] == ["adapter_config.json"]


def test_the_factors_of_an_adapter_of_peft_are_all_there(tiny):
    folder = tiny("adapter", rank_pattern={"up_proj": 3})
    patch = load_patch(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as theirs:
        keys = set(theirs.keys())
        stored = stored_tensors(patch)
        assert set(stored) == keys
        for key in keys:
            piece = theirs.get_slice(key)
            assert (stored[key].dtype, list(stored[key].shape)) == (piece.get_dtype(), piece.get_shape())
    assert len(patch.deltas) == 14
    assert list(patch.deltas) == sorted(patch.deltas)
    assert {delta.rank for delta in patch.deltas.values()} == {3, 4}


CONFIGURATIONS = {
    "plain": {},
    "stabilized": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {r"layers\.1\..*": 1, "q_proj": 30}},
    "an expression": {"target_modules": r".*layers\.1.*(q|k|up)_proj", "exclude_modules": r".*k_proj"},
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "all linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("what", CONFIGURATIONS)
@pytest.mark.filterwarnings("ignore:Unmatched keys")
def test_written_back_it_gives_the_same_logits_in_peft(what, tiny, tmp_path):
    from tests.models import load_tuned, logits

    folder = tiny("adapter", **CONFIGURATIONS[what])
    ours = rewrite(load_patch(folder), tmp_path / "ours")
    expected = logits(load_tuned(tiny("base"), folder))
    assert logits(load_tuned(tiny("base"), ours)).equal(expected)
    from transformers import LlamaForCausalLM

    assert not logits(LlamaForCausalLM.from_pretrained(tiny("base"), dtype="auto")).equal(expected)


def test_rewriting_again_changes_no_byte(tiny, tmp_path):
    folder = tiny("adapter")
    first = rewrite(load_patch(folder), tmp_path / "first")
    second = rewrite(load_patch(first), tmp_path / "second")
    assert contents(first) == contents(second)
    assert set(contents(first)) == {"adapter_config.json", "adapter_model.safetensors"}


def test_what_the_safetensors_library_wrote_is_written_with_the_same_values(tiny, tmp_path):
    folder = tiny("adapter")
    ours = rewrite(load_patch(folder), tmp_path / "ours")
    with (
        safe_open(folder / "adapter_model.safetensors", "pt") as theirs,
        safe_open(ours / "adapter_model.safetensors", "pt") as rewritten,
    ):
        assert rewritten.metadata() == theirs.metadata() == {"format": "pt"}
        assert set(rewritten.keys()) == set(theirs.keys())
        assert all(rewritten.get_tensor(key).equal(theirs.get_tensor(key)) for key in theirs.keys())  # noqa: SIM118


def test_the_order_of_tensors_and_fields_does_not_matter_to_what_is_written(adapter, tmp_path):
    first = rewrite(load_patch(adapter()), tmp_path / "first")
    turned = adapter(dict(reversed(FACTORS.items())), config=dict(reversed(CONFIG.items())))
    assert contents(rewrite(load_patch(turned), tmp_path / "second")) == contents(first)


def test_the_configuration_is_kept_but_for_the_bases_name(adapter, tmp_path):
    config = {**CONFIG, "lora_dropout": 0.1, "base_model_name_or_path": "old", "peft_version": "9", "revision": None}
    ours = rewrite(load_patch(adapter(config=config)), tmp_path / "ours", base_name="new/größe")
    text = (ours / "adapter_config.json").read_text(encoding="utf-8")
    assert json.loads(text) == {**config, "base_model_name_or_path": "new/größe"}
    assert list(json.loads(text)) == sorted(config)
    assert "größe" in text


def test_patterns_keep_their_order_because_the_first_that_matches_wins(adapter, tmp_path):
    patterns = {"self_attn.q_proj": 2, "q_proj": 7}
    alphas = {"q_proj": 4, r"layers\.0\..*": 8}
    config = {**CONFIG, "r": 7, "rank_pattern": patterns, "alpha_pattern": alphas}
    patch = load_patch(adapter(config=config))
    again = load_patch(rewrite(patch, tmp_path / "ours"))
    assert [delta.scale for delta in again.deltas.values()] == [delta.scale for delta in patch.deltas.values()] == [2.0]
    assert list(again.config.fields["rank_pattern"]) == list(patterns)


def test_opening_reads_no_byte_of_a_factor(adapter, monkeypatch):
    def refuse(*_):
        raise AssertionError("bytes of a factor were read")

    folder = adapter()
    monkeypatch.setattr("os.pread", refuse)
    assert len(load_patch(folder).deltas) == 1


def with_key(key, *, dtype="F32", shape=(2,)):
    return {**FACTORS, key: (dtype, shape, bytes(4 * (shape[0] if shape else 1)))}


UNEXPLAINED = "a weight of the model that neither 'modules_to_save' nor 'bias' explains"
WITHOUT = "without the prefix 'base_model.model.'"
FOREIGN_KEYS = {
    "base_model.model.lm_head.modules_to_save.default.weight": UNEXPLAINED,
    "base_model.model.model.layers.0.self_attn.k_proj.bias": UNEXPLAINED,
    "base_model.model.model.norm.weight": UNEXPLAINED,
    "base_model.model.lm_head.weight": UNEXPLAINED,
    f"{PREFIX}.lora_C.weight": UNEXPLAINED,
    f"{PREFIX}.lora_diag": "a KaSA diagonal",
    f"{PREFIX}.base_layer.lora_A.weight": "a factor of a parameter, but 'target_parameters' names none",
    "model.layers.0.self_attn.q_proj.lora_A.weight": WITHOUT,
    f"x.{PREFIX}.lora_A.weight": WITHOUT,
    "base_model.model..lora_A.weight": "of no module",
    "base_model.model.": "of no module",
    "": WITHOUT,
}


@pytest.mark.parametrize("key", FOREIGN_KEYS)
def test_a_tensor_that_has_no_meaning_is_refused_by_its_name(key, adapter):
    with pytest.raises(AdapterFormatError, match=FOREIGN_KEYS[key]) as refused:
        load_patch(adapter(with_key(key)))
    assert f"tensor '{key}'" in str(refused.value)


EMBEDDING = "base_model.model.model.embed_tokens"
CONTRADICTIONS = {
    "a magnitude, no use_dora": ({f"{PREFIX}.lora_magnitude_vector": (5,)}, {}, "has a DoRA magnitude, but 'use_dora'"),
    "use_dora, no magnitude": ({}, {"use_dora": True}, "lacks a DoRA magnitude, but 'use_dora' is True"),
    "a bias of B, no lora_bias": ({f"{PREFIX}.lora_B.bias": (5,)}, {}, "a bias of lora_B, but 'lora_bias' is False"),
    "lora_bias, no bias of B": ({}, {"lora_bias": True}, "lacks a bias of lora_B, but 'lora_bias' is True"),
    "a trained bias, bias none": ({f"{PREFIX}.base_layer.bias": (5,)}, {}, "has a trained bias, but 'bias' is none"),
    "a bias elsewhere, bias lora_only": (
        {"base_model.model.model.layers.0.self_attn.k_proj.bias": (5,)}, {"bias": "lora_only"}, UNEXPLAINED,
    ),
    "token rows, no indices": (
        {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (2, 3)}, {}, "trained token rows, .* names 0",
    ),
    "fewer token rows than indices": (
        {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (2, 3)},
        {"trainable_token_indices": [1, 2, 3]},
        r"\(2, 3\) trained token rows, but 'trainable_token_indices' names 3",
    ),
    "a token twice": (
        {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (2, 3)}, {"trainable_token_indices": [1, 1]}, "names 2",
    ),
    "token rows of one axis": (
        {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (2,)}, {"trainable_token_indices": [1, 2]}, "names 2",
    ),
    "a DoRA of an embedding": (
        {f"{EMBEDDING}.lora_embedding_A": (2, 9), f"{EMBEDDING}.lora_embedding_B": (3, 2),
         f"{EMBEDDING}.lora_magnitude_vector": (3,), f"{PREFIX}.lora_magnitude_vector": (5,)},
        {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
        "is an embedding with a DoRA magnitude, which is not supported",
    ),
    "half an embedding": ({f"{EMBEDDING}.lora_embedding_A": (2, 9)}, {}, "has 'lora_embedding_A' but not its partner"),
    "a magnitude alone": (
        {"base_model.model.x.lora_magnitude_vector": (5,), f"{PREFIX}.lora_magnitude_vector": (5,)},
        {"use_dora": True},
        "module 'x' has 'lora_magnitude_vector' but no factors",
    ),
    "a copy of a weight alone": (
        {"base_model.model.x.base_layer.weight": (5, 3)}, {}, "module 'x' has 'base_layer.weight' but no factors",
    ),
    "no token row": (
        {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (0, 3)}, {"trainable_token_indices": []}, "names 0",
    ),
    "a bias of a base layer alone": (
        {"base_model.model.x.base_layer.bias": (5,), f"{PREFIX}.base_layer.bias": (5,)},
        {"bias": "all"},
        "module 'x' has 'base_layer.bias' but no factors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_tensors_and_configuration_that_contradict_each_other_are_refused(what, adapter):
    shapes, fields, message = CONTRADICTIONS[what]
    more = {key: ("F32", shape, bytes(4 * count(shape))) for key, shape in shapes.items()}
    with pytest.raises(AdapterFormatError, match=message):
        load_patch(adapter({**FACTORS, **more}, config={**CONFIG, **fields}))


def test_all_tensors_that_have_no_meaning_are_named_at_once(adapter):
    foreign = {f"base_model.model.x{number}.weight": ("F32", (1,), bytes(4)) for number in range(13)}
    with pytest.raises(AdapterFormatError) as refused:
        load_patch(adapter({**FACTORS, **foreign}))
    assert str(refused.value).count(UNEXPLAINED) == 10
    assert "; and 3 more." in str(refused.value)


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_factor_without_its_partner_is_refused(letter, adapter):
    tensors = {key: value for key, value in FACTORS.items() if f"lora_{letter}" in key}
    with pytest.raises(AdapterFormatError, match=rf"q_proj' has 'lora_{letter}\.weight' but not its partner"):
        load_patch(adapter(tensors))


BAD_FACTORS = {
    "ranks that differ": ((3, 3), (5, 2), "F32", "lora_A has rank 3, but lora_B has rank 2"),
    "a rank that the configuration does not say": (
        (4, 3),
        (5, 4),
        "F32",
        "have rank 4, but adapter_config.json says 2",
    ),
    "one axis": ((2,), (5, 2), "F32", r"lora_A.weight' has shape \(2,\), expected two axes"),
    "three axes": ((2, 3), (5, 2, 1), "F32", r"lora_B.weight' has shape \(5, 2, 1\), expected two axes; .*convolution"),
    "whole numbers": ((2, 3), (5, 2), "I8", "lora_A.weight' has dtype I8, expected one of F64, F32, F16, BF16"),
}


@pytest.mark.parametrize("what", BAD_FACTORS)
def test_factors_that_do_not_fit_are_refused(what, adapter):
    a, b, dtype, message = BAD_FACTORS[what]
    width = {"F32": 4, "I8": 1}[dtype]
    tensors = {}
    for key, shape in zip(FACTORS, (a, b), strict=True):
        size = width
        for axis in shape:
            size *= axis
        tensors[key] = (dtype, shape, bytes(size))
    with pytest.raises(AdapterFormatError, match=message):
        load_patch(adapter(tensors))


def test_an_adapter_without_tensors_is_refused(adapter):
    with pytest.raises(AdapterFormatError, match="it contains no LoRA factors"):
        load_patch(adapter({}))


MODULE = PREFIX.removeprefix("base_model.model.")
BAD_SHAPES = {
    "a magnitude of another length": ("lora_magnitude_vector", (3,), {"use_dora": True}),
    "a magnitude of two axes": ("lora_magnitude_vector", (5, 1), {"use_dora": True}),
    "a bias of another length": ("lora_B.bias", (4,), {"lora_bias": True}),
}


@pytest.mark.parametrize("what", BAD_SHAPES)
def test_a_vector_that_is_not_as_long_as_the_module_is_wide_is_refused(what, adapter):
    leaf, shape, fields = BAD_SHAPES[what]
    tensors = {**FACTORS, f"{PREFIX}.{leaf}": ("F32", shape, bytes(4 * count(shape)))}
    with pytest.raises(AdapterFormatError, match=re.escape(f"{leaf}' has shape {shape}, expected (5,)")):
        load_patch(adapter(tensors, config={**CONFIG, **fields}))


TWICE = {
    "factors and a full value": (
        {f"{PREFIX}.weight": (5, 3)},
        {"modules_to_save": ["q_proj"]},
        "factors and a full value",
    ),
    "factors and rows": (
        {f"{PREFIX}.token_adapter.trainable_tokens_delta": (1, 3)},
        {"trainable_token_indices": {"q_proj": [2]}},
        "factors and trained rows",
    ),
    "a bias and what is added to it": (
        {f"{PREFIX}.lora_B.bias": (5,), f"{PREFIX}.base_layer.bias": (5,)},
        {"bias": "all", "lora_bias": True},
        "a full value and a bias of lora_B",
    ),
    "two biases": ({f"{PREFIX}.bias": (5,), f"{PREFIX}.base_layer.bias": (5,)}, {"bias": "all"}, "occurs twice"),
}


@pytest.mark.parametrize("what", TWICE)
def test_a_tensor_that_is_changed_in_two_ways_is_refused(what, adapter):
    shapes, fields, message = TWICE[what]
    more = {key: ("F32", shape, bytes(4 * count(shape))) for key, shape in shapes.items()}
    with pytest.raises(AdapterFormatError, match=rf"'{MODULE}.(weight|bias)' .*{message}"):
        load_patch(adapter({**FACTORS, **more}, config={**CONFIG, **fields}))


def test_a_pickled_adapter_is_refused_with_the_command_that_converts_it(adapter):
    folder = adapter(None)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterFormatError, match=r"never read.*convert it once: python -c .*weights_only=True"):
        load_patch(folder)


def test_the_command_that_converts_a_pickle_works(tiny, tmp_path):
    import runpy

    import torch
    from safetensors.torch import load_file

    folder = tmp_path / "adapter"
    shutil.copytree(tiny("adapter"), folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    expected = digest_tensors(load_patch(folder))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFormatError) as refused:
        load_patch(folder)
    code = str(refused.value).split('python -c "')[1].removesuffix('".')
    (tmp_path / "command.py").write_text(code)
    runpy.run_path(str(tmp_path / "command.py"))
    assert digest_tensors(load_patch(folder)) == expected


def test_a_pickle_beside_the_tensors_is_not_looked_at(adapter):
    folder = adapter()
    (folder / "adapter_model.bin").write_bytes(b"")
    assert len(load_patch(folder).deltas) == 1


def test_a_folder_without_tensors_is_refused(adapter):
    with pytest.raises(AdapterFormatError, match=r"has adapter_config\.json but no adapter_model\.safetensors"):
        load_patch(adapter(None))


def test_a_folder_without_configuration_is_refused(tmp_path):
    with pytest.raises(
        AdapterFormatError, match=r"has no adapter_config\.json, so it is not an adapter folder\. Pass the folder"
    ):
        load_patch(tmp_path)


def test_a_folder_around_an_adapter_is_refused_with_the_way_in(adapter):
    with pytest.raises(AdapterFormatError, match=r"Its subfolder 'adapter' is one: pass .*/adapter$"):
        load_patch(adapter().parent)


@pytest.mark.parametrize(("name", "said"), [("none", "no such folder"), ("file", "is a file. A patch is a folder")])
def test_a_place_that_is_no_folder_is_refused(name, said, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterFormatError, match=f"{name}': {said}"):
        load_patch(tmp_path / name)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"peft_type": "LORA"}'])
def test_a_configuration_that_is_damaged_is_refused(text, adapter):
    folder = adapter()
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterFormatError, match="adapter"):
        load_patch(folder)


def test_a_tensor_file_that_is_damaged_is_refused(adapter):
    folder = adapter()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(HeaderError, match="the tensors end at byte"):
        load_patch(folder)


IDENTITY = ModelIdentity("base", "s4k1:" + "a" * 40, "blake3:" + "b" * 64)
OTHER = ModelIdentity("größer", "s4k1:" + "c" * 40, None)
RECORD = PatchRecord(
    base=OTHER,
    capture=Capture("train", {"steps": 3, "rate": 1e-4, "data": {"file": "x.jsonl"}}),
    ports=(PortStep(IDENTITY, OTHER, "add", {"sampled_drift": 0.125}, {"lm_head.weight": ("größer", "<end>")}),),
    tensors={"k": "d" * 64},
    program="0.1.0",
    files={"adapter_config.json": "e" * 64, "adapter_model.safetensors": "f" * 64},
)


def test_a_record_survives_its_file_and_names_the_files_beside_it(tmp_path):
    for name in RECORD.files:
        (tmp_path / name).write_bytes(name.encode())
    written = write_record(tmp_path, RECORD)
    assert read_record(tmp_path) == written
    assert written.files == {name: blake3(name.encode()).hexdigest() for name in RECORD.files}
    assert structs.replace(written, files=RECORD.files) == RECORD
    assert decode(PatchRecord, encode(RECORD)) == RECORD


@pytest.mark.parametrize("seal", ["kept", "of other values", "none"])
def test_a_record_that_was_changed_by_hand_is_refused(seal, adapter):
    folder = adapter()
    values = json.loads(render_sealed(encode(RECORD)))
    values["base"]["name"] = "another"
    if seal == "of other values":
        values["seal"] = "blake3:" + "0" * 64
    elif seal == "none":
        del values["seal"]
    (folder / "patch.json").write_text(json.dumps(values))
    with pytest.raises(PatchRecordError, match="seal"):
        load_patch(folder)


def test_a_folder_without_a_record_has_none(tmp_path):
    assert read_record(tmp_path) is None


def change(*path, value=None, drop=False):
    record = json.loads(json.dumps(encode(RECORD)))
    place = record
    for step in path[:-1]:
        place = place[step]
    if drop:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return record


BAD_RECORDS = {
    "another version": change("format", value=2),
    "no version": change("format", drop=True),
    "version as text": change("format", value="1"),
    "a field more": change("note", value="x"),
    "a field more in the base": change("base", "note", value="x"),
    "a field more in the capture": change("capture", "note", value="x"),
    "a field more in a port": change("ports", 0, "note", value="x"),
    "no base": change("base", drop=True),
    "no digest": change("base", "digest", drop=True),
    "short fingerprint": change("base", "fingerprint", value="s4k1:abc"),
    "fingerprint of another rule": change("base", "fingerprint", value="s8k1:" + "a" * 40),
    "fingerprint with a tail": change("base", "fingerprint", value="s4k1:" + "a" * 41),
    "capital digits": change("base", "fingerprint", value="s4k1:" + "A" * 40),
    "bad digest": change("base", "digest", value="sha256:" + "b" * 64),
    "name that is a number": change("base", "name", value=1),
    "unknown capture": change("capture", "method", value="guess"),
    "settings that are a list": change("capture", "settings", value=[]),
    "ports that are an object": change("ports", value={}),
    "port without a method": change("ports", 0, "method", value=""),
    "evidence that is text": change("ports", 0, "evidence", value={"drift": "much"}),
    "tokens that are no list": change("ports", 0, "left_out", value={"w": "a"}),
    "tokens that are numbers": change("ports", 0, "left_out", value={"w": [1]}),
    "bad digest of a tensor": change("tensors", "k", value="d" * 63),
    "a file without a digest": change("files", "adapter_config.json", drop=True),
    "a digest of another file": change("files", "../x", value="d" * 64),
    "a list": [],
    "nothing": None,
}


@pytest.mark.parametrize("what", BAD_RECORDS)
def test_a_record_that_breaks_the_schema_is_refused(what, adapter):
    folder = adapter()
    record = BAD_RECORDS[what]
    (folder / "patch.json").write_text(render_sealed(record) if isinstance(record, dict) else json.dumps(record))
    with pytest.raises(PatchRecordError, match=r"patch\.json'") as refused:
        load_patch(folder)
    assert "its seal" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_record_that_is_no_json_is_refused(content, adapter):
    folder = adapter()
    (folder / "patch.json").write_bytes(content)
    with pytest.raises(PatchRecordError, match=r"patch\.json': is not valid JSON"):
        load_patch(folder)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_of_the_head_carries_a_copy_that_is_told_apart(tiny, tmp_path):
    base = tiny("base", tied=False)
    folder = tiny("adapter", of=base, target_modules=["q_proj", "lm_head"])
    patch = load_patch(folder)
    assert set(patch.base_copies) == {"lm_head.weight"}
    weight = open_checkpoint(base).infos["lm_head.weight"]
    assert [read_bytes(copy) for copy in patch.base_copies["lm_head.weight"]] == [read_bytes(weight)]
    assert "lm_head" in patch.deltas
    assert not any("base_layer" in key for key in stored_tensors(patch))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_captured_adapter_of_the_head_is_without_the_copy_and_gives_the_same_logits(tiny, tmp_path):
    from tests.models import load_tuned, logits

    base = tiny("base", tied=False)
    folder = tiny("adapter", of=base, target_modules=["q_proj", "lm_head"])
    patch = capture_adapter(load_patch(folder), base=open_checkpoint(base), out=tmp_path / "patch")
    assert patch.base_copies == {}
    with safe_open(tmp_path / "patch" / "adapter_model.safetensors", "pt") as stored:
        assert not any("base_layer" in key for key in stored.keys())  # noqa: SIM118
    assert logits(load_tuned(base, tmp_path / "patch")).equal(logits(load_tuned(base, folder)))
