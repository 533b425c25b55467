"""What is given for something else: each message names the likely cause and the way out."""

import json
import shutil

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from portllm.checkpoint.model.identity import fingerprint, fingerprint_in
from portllm.checkpoint.open import open_checkpoint
from tests.models import SEVERAL_SHARDS, make_adapter, make_base, make_evolved

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4976698672\n"
PICKLE = b"PK\x03\x04" + bytes(60)
FETCH = ("is a Git LFS pointer", "git lfs pull", "hf download")


def adapter_in_gguf(path):
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that can be confused."""
    from portllm.capturing.adapter import capture_adapter
    from portllm.merging.merge import merge
    from portllm.patch.adapter_folder import load_patch
    from portllm.porting.port import port

    here = tmp_path_factory.mktemp("place")
    base = make_base(here / "base", dtype=torch.float32)
    make_base(here / "shards", max_shard_size=SEVERAL_SHARDS)
    make_evolved(base, here / "evolved")
    adapter = make_adapter(base, here / "adapter")
    patch = capture_adapter(load_patch(adapter), base=open_checkpoint(base), out=here / "patch")
    merge(patch, into=base, out=here / "merged")
    port(patch, evolved=here / "evolved", out=here / "ported")
    for seed in (0, 1):
        how = {"method": "train", "settings": {"seed": seed}, "out": here / f"seed-{seed}"}
        trained = capture_adapter(load_patch(adapter), base=open_checkpoint(base), **how)
        port(trained, evolved=here / "evolved", out=here / f"ported-{seed}")
    (here / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    shutil.copytree(base, here / "team" / "models" / "base")
    shutil.copytree(adapter, here / "team" / "tickets")
    (here / "team" / ".hidden").mkdir()
    (here / "certified").mkdir()
    (here / "headless").mkdir()
    shutil.copy(adapter / "adapter_model.safetensors", here / "headless")
    (here / "certified" / "certificate.json").write_text("{}")
    shutil.copytree(base, here / "half")
    halves = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(halves, here / "half" / "model.safetensors", metadata={"format": "pt"})

    def instead(source, name, file, content):
        shutil.copytree(here / source, here / name)
        (here / name / file).write_bytes(content)

    shard = next((here / "shards").glob("model-00001-of-*")).name
    instead("base", "lfs-weights", "model.safetensors", POINTER)
    instead("shards", "lfs-shard", shard, POINTER)
    instead("shards", "lfs-index", "model.safetensors.index.json", POINTER)
    instead("base", "lfs-config", "config.json", POINTER)
    instead("base", "lfs-tokenizer", "tokenizer.json", POINTER)
    instead("adapter", "lfs-adapter", "adapter_model.safetensors", POINTER)
    instead("adapter", "lfs-adapter-config", "adapter_config.json", POINTER)
    instead("patch", "lfs-record", "patch.json", POINTER)
    instead("adapter", "list-adapter", "adapter_config.json", b"[]")
    instead("base", "list-config", "config.json", b"[1]")
    instead("patch", "list-record", "patch.json", b"[]")
    instead("base", "renamed-pickle", "model.safetensors", PICKLE)
    instead("base", "web-page", "model.safetensors", b"<!DOCTYPE html><html></html>")
    instead("base", "pickle", "pytorch_model.bin", PICKLE)
    (here / "pickle" / "model.safetensors").unlink()
    shutil.copytree(here / "shards", here / "missing")
    (here / "missing" / shard).unlink()
    for step in (500, 1000):
        shutil.copytree(adapter, here / "run" / f"checkpoint-{step}")
        shutil.copytree(base, here / "full-run" / f"checkpoint-{step}")
    (here / "model.gguf").write_bytes(POINTER)
    (here / "weights.pt").write_bytes(PICKLE)
    (here / "gguf").mkdir()
    adapter_in_gguf(here / "gguf" / "adapter.gguf")
    return here


CAPTURE = ("capture", "--base", "base", "-o", "out", "--adapter")
PORT = ("port", "--base", "base", "--evolved", "evolved", "-o", "out")
MERGE = ("merge", "--into", "base", "-o", "out")
IS_MODEL = ("is a model, not an adapter", "portllm capture --base BASE --tuned base -o PATCH")
IS_ADAPTER = ("is an adapter, not a model", "as the base")
IS_PICKLE = ("is a pickle", "never read", "save_pretrained")
OF_ADAPTER = ("is a file of an adapter", "Pass its folder: adapter")
OF_MODEL = ("is a file of a model's folder", "Pass the folder: base")
IN_GGUF = ("adapter in GGUF", "PEFT folder that it was converted from")
SWAPPED = ("the two are swapped", "--base base --evolved evolved")
BELOW = ("is no model itself", "adapters: tickets; models: models/base", "such as team/tickets")
IN_HALF = ("another dtype", "in BF16", "--allow-other-base")

WRONG = {
    "a file of an adapter": ((*CAPTURE, "adapter/adapter_model.safetensors"), OF_ADAPTER),
    "an adapter's configuration": ((*PORT, "adapter/adapter_config.json"), OF_ADAPTER),
    "a patch's record": ((*MERGE, "patch/patch.json"), ("is a file of an adapter", "Pass its folder: patch")),
    "a model's configuration": (("inspect", "base/config.json"), OF_MODEL),
    "an index": (("inspect", "shards/model.safetensors.index.json"), ("Pass the folder: shards",)),
    "an adapter as GGUF": ((*CAPTURE, "gguf/adapter.gguf"), IN_GGUF),
    "a folder with an adapter as GGUF": ((*PORT, "gguf"), IN_GGUF),
    "an adapter as GGUF for a model": (("inspect", "gguf/adapter.gguf"), ("LoRA adapter for llama.cpp", "PEFT folder")),
    "a pointer for weights": (("inspect", "lfs-weights"), FETCH),
    "a pointer for a shard": (("inspect", "lfs-shard"), FETCH),
    "a pointer for an index": (("inspect", "lfs-index"), FETCH),
    "a pointer for a configuration": (("inspect", "lfs-config"), FETCH),
    "a pointer for a tokenizer": (("merge", "adapter", "--into", "lfs-tokenizer", "-o", "out"), FETCH),
    "a pointer for a GGUF file": (("inspect", "model.gguf"), FETCH),
    "a pointer for an adapter": ((*MERGE, "lfs-adapter"), FETCH),
    "a pointer for an adapter's configuration": ((*PORT, "lfs-adapter-config"), FETCH),
    "a pointer for a record": ((*PORT, "lfs-record"), FETCH),
    "a list for an adapter's configuration": ((*CAPTURE, "list-adapter"), ("JSON object, not a list", "Download it")),
    "a list for a model's configuration": (("inspect", "list-config"), ("JSON object, not a list", "Download it")),
    "a list for a record": ((*PORT, "list-record"), ("JSON object, not a list", "Download it")),
    "a pickle": (("inspect", "weights.pt"), IS_PICKLE),
    "a pickle as an adapter": ((*CAPTURE, "weights.pt"), IS_PICKLE),
    "a folder of pickles": (("inspect", "pickle"), ("pickled weights", "never read", "save_pretrained")),
    "a pickle under another name": (("inspect", "renamed-pickle"), IS_PICKLE),
    "a web page": (("inspect", "web-page"), ("is a web page", "hf download")),
    "a missing shard": (("inspect", "missing"), ("shards are missing", "hf download ORG/NAME --local-dir missing")),
    "a run of adapters as an adapter": ((*CAPTURE, "run"), ("training run", "run/checkpoint-1000")),
    "a run of adapters as a model": (("inspect", "run"), ("training run", "as the patch: run/checkpoint-1000")),
    "a run of models": (("merge", "adapter", "--into", "full-run", "-o", "out"), ("full-run/checkpoint-1000",)),
    "a model as an adapter": ((*CAPTURE, "base"), IS_MODEL),
    "a model as a patch": ((*PORT, "base"), IS_MODEL),
    "a merged model as a patch": ((*PORT, "merged"), ("a patch was merged into", "Pass the patch itself")),
    "an adapter as a base": (("check", "patch", "--base", "adapter", "--evolved", "evolved"), IS_ADAPTER),
    "an adapter as a tuned model": (("capture", "--base", "base", "--tuned", "adapter", "-o", "out"), IS_ADAPTER),
    "base and evolved swapped": (("check", "patch", "--base", "evolved", "--evolved", "base"), SWAPPED),
    "the two swapped in a port": (("port", "patch", "--base", "evolved", "--evolved", "base", "-o", "out"), SWAPPED),
    "a patch of another model": (
        ("merge", "patch", "--into", "evolved", "-o", "out"),
        ("patch 'patch' belongs to", "portllm port patch --evolved evolved -o PORTED"),
    ),
    "a folder of models and adapters": (("inspect", "team"), BELOW),
    "a mistyped model": (("inspect", "bsae"), ("no such file or folder", "Did you mean 'base'?")),
    "a mistyped patch": ((*PORT, "Patch2"), ("no such folder", "Did you mean 'patch'?")),
    "a mistyped folder to verify": (("verify", "portd"), ("no such folder", "Did you mean 'ported'?")),
    "an adapter without its configuration": (("inspect", "headless"), ("without its adapter_config.json. Copy that",)),
    "rows for a fleet": (("fleet", "rows.jsonl"), ("is not valid TOML", "Pass the fleet's TOML file")),
    "rows for a key": (("sign", "patch", "--key", "rows.jsonl"), ("'rows.jsonl': is no PEM file",)),
    "a certificate as a model": (("inspect", "certified"), ("is a certificate, not a model", "portllm verify")),
    "another dtype": (("check", "patch", "--base", "half", "--evolved", "evolved"), IN_HALF),
    "another dtype in a merge": (("merge", "patch", "--into", "half", "-o", "out"), IN_HALF),
}


@pytest.mark.parametrize(("arguments", "named"), WRONG.values(), ids=WRONG)
def test_the_message_names_the_cause_and_the_way_out(arguments, named, place, portllm, monkeypatch):
    monkeypatch.chdir(place)
    done = portllm(*arguments)
    assert done.status in (1, 3)
    for part in named:
        assert part in done.out + done.err
    assert not (place / "out").exists()


@pytest.mark.parametrize("verb", [("evaluate",), ("certify", "-o", "out")], ids=["evaluate", "certify"])
@pytest.mark.parametrize(
    ("base", "patch", "evolved", "ported", "said"),
    [
        ("evolved", "patch", "base", "ported", "the two are swapped. Pass --base base --evolved evolved."),
        ("base", "ported", "evolved", "patch", "it is the ported patch. Pass --patch patch --ported ported."),
        ("base", "seed-0", "evolved", "ported-1", "ported-1 was not ported from seed-0: by their records"),
    ],
)
def test_what_was_given_for_each_other_is_told_in_one_line(
    verb, base, patch, evolved, ported, said, place, portllm, monkeypatch
):
    monkeypatch.chdir(place)
    models = ("--base", base, "--patch", patch, "--evolved", evolved, "--ported", ported)
    done = portllm(*verb, *models, "--data", "rows.jsonl", "-q")
    assert done.status == 1
    assert said in done.err
    assert [line for line in done.err.splitlines() if line.startswith(("portllm:", "  "))][1:] == []


def test_a_model_in_another_dtype_is_known_by_what_it_would_be_in_that(place):
    base, half = (open_checkpoint(place / name) for name in ("base", "half"))
    assert fingerprint_in(base, "BF16") == fingerprint(half)
    assert fingerprint_in(half, "BF16") == fingerprint(half)
    assert fingerprint_in(open_checkpoint(place / "evolved"), "BF16") != fingerprint(half)


def test_an_update_of_the_dtype_alone_is_said_to_be_one(place, portllm):
    done = portllm("check", place / "patch", "--base", place / "base", "--evolved", place / "half", "--json")
    report = json.loads(done.out)
    assert report["update"]["same_in"] == "BF16"
    assert "rounding alone" in " ".join(report["patches"][0]["remarks"])
    other = portllm("check", place / "patch", "--base", place / "base", "--evolved", place / "evolved", "--json")
    assert json.loads(other.out)["update"]["same_in"] is None
