"""Makes `tests/artefacts/VERSION/`: what the program of that version writes to disk, tiny and from fixed seeds.

The program is used by its commands alone, so that any version of it can be asked; see README.md.
"""

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

import portllm as api
from portllm.cli.main import main
from tests.language import make_reader
from tests.models import make_adapter, make_evolved
from tests.processes import die_at_event, in_child
from tests.safetensors_files import write_tensors
from tests.study.small import write_study

QUERY, OTHER = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
EMBEDDING, NORM = "model.embed_tokens", "model.norm"
SHAPES = {EMBEDDING: (6, 4), QUERY: (5, 4), OTHER: (5, 4), NORM: (4,)}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 6}

LONG_AGO = 1_000_000_000

FLEET = """\
patches = ["../adapter", "../adapter-rows"]
evolved = ["../models/evolved"]
base = "../models/base"
do = ["port"]
output = "out"
"""


def bfloat16(values):
    """A tensor as `write_tensors` takes it."""
    stored = values.to(torch.bfloat16).contiguous()
    return "BF16", tuple(values.shape), stored.view(torch.uint8).numpy().tobytes()


def numbers(shape, *, seed):
    """Seeded values of size one half, likewise."""
    return bfloat16(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 2)


def write_models(folder):
    """A base and two updates of it, each in two files, so that a merge can die between them."""
    drawn = torch.Generator().manual_seed(0)
    base = {f"{name}.weight": torch.randn(shape, generator=drawn) for name, shape in SHAPES.items()}
    for drift, model in ((0.0, "base"), (0.02, "evolved"), (0.04, "later")):
        (folder / model).mkdir(parents=True)
        (folder / model / "config.json").write_text(json.dumps(CONFIG))
        noise = torch.Generator().manual_seed(1)
        stored = {
            name: bfloat16(value + drift * torch.randn(value.shape, generator=noise)) for name, value in base.items()
        }
        places = {name: f"model-0000{1 + number // 2}-of-00002.safetensors" for number, name in enumerate(stored)}
        for file in sorted(set(places.values())):
            write_tensors(folder / model / file, {name: stored[name] for name in stored if places[name] == file})
        (folder / model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        for file in set(places.values()):
            os.utime(folder / model / file, (LONG_AGO, LONG_AGO))  # a merge is gone on with while they are the same


def write_adapter(folder, tensors, **config):
    """A PEFT adapter with factors of rank one for the query projections, and what else is asked for."""
    folder.mkdir()
    fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    factors = {
        f"{module}.lora_{name}.weight": numbers(shape, seed=seed)
        for seed, (module, name, shape) in enumerate(
            (module, *factor) for module in (QUERY, OTHER) for factor in (("A", (1, 4)), ("B", (5, 1)))
        )
    }
    write_tensors(
        folder / "adapter_model.safetensors",
        {f"base_model.model.{name}": tensor for name, tensor in sorted({**factors, **tensors}.items())},
    )


def run(*arguments):
    """Runs a command in this process, which it ends."""
    sys.argv = ["portllm", *map(str, arguments)]
    main()


def portllm(*arguments):
    """Runs a command, which must do its work, whatever its verdict."""
    assert in_child(lambda: run(*arguments)) in (0, 3), arguments


def merge(out):
    """The merge, in two files, which are smaller than the command makes any."""
    evolved = api.open_checkpoint("models/evolved")
    api.merge(api.load_patch(Path("ported")), into=evolved, out=Path(out), options=api.MergeOptions(shard_bytes=100))


def die_once(leaves, work, *, below):
    """Does a piece of work in a process that is killed as soon as it has left what `leaves` asks for."""

    def begin(number):
        die_at_event(number, below=below)
        work()

    for number in range(1000):
        status = in_child(lambda number=number: begin(number))
        assert status == -signal.SIGKILL, "it came to its end"
        if leaves():
            return
    raise AssertionError


def make(folder):
    """Everything, below a folder that is not there yet."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    versions = {name: importlib.metadata.version(name) for name in ("portllm", "torch", "transformers", "peft")}
    Path("versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    write_models(Path("models"))
    write_adapter(Path("adapter"), {})
    write_adapter(
        Path("adapter-rows"),
        {
            f"{EMBEDDING}.token_adapter.trainable_tokens_delta": numbers((2, 4), seed=7),
            f"{NORM}.weight": numbers((4,), seed=8),
        },
        trainable_token_indices=[2, 5],
        modules_to_save=["norm"],
    )
    base, evolved, later = (f"models/{name}" for name in ("base", "evolved", "later"))
    for name in ("adapter", "adapter-rows"):
        portllm("capture", "--adapter", name, "--base", base, "-o", name.replace("adapter", "patch"))
    portllm("port", "patch", "--evolved", evolved, "-o", "ported")
    portllm("port", "ported", "--evolved", later, "-o", "ported-twice")
    portllm("port", "patch-rows", "--base", base, "--evolved", evolved, "-o", "ported-rows")
    portllm("port", "patch", "--base", base, "--evolved", evolved, "--method", "auto", "--force", "-o", "ported-auto")
    assert in_child(lambda: merge("merged")) == 0

    os.mkdir("killed")
    journal = Path("killed/.merged.journal")
    die_once(
        lambda: journal.exists() and journal.read_text().count('"file"') == 2,
        lambda: merge("killed/merged"),
        below="killed",
    )
    journal.write_bytes(journal.read_bytes()[:-20])  # it died while it noted the last file
    shutil.copytree(evolved, "in-place")
    portllm("merge", "ported", "--into", "in-place", "--in-place")
    marked = Path("in-place-killed/portllm-unfinished.json")
    shutil.copytree(evolved, marked.parent)
    die_once(
        lambda: marked.exists() and Path("in-place-killed/.portllm-undo").exists(),
        lambda: run("merge", "ported", "--into", "in-place-killed", "--in-place"),
        below="in-place-killed",
    )

    os.mkdir("fleet")
    Path("fleet/fleet.toml").write_text(FLEET)
    portllm("fleet", "fleet/fleet.toml", "--workers", "1")
    Path("fleet/out/.fleet.lock").unlink(missing_ok=True)

    key = ec.derive_private_key(20250101, ec.SECP256R1())
    with tempfile.NamedTemporaryFile() as secret:
        secret.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        secret.flush()
        shutil.copytree("ported", "signed")
        portllm("sign", "signed", "--key", secret.name)
    Path("key.pem").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        running_models(folder)


def running_models(folder):
    """A certificate and a study, in the current folder: their models need a tokenizer, and are not kept."""
    reader = make_reader(Path("base"))
    changed = make_evolved(reader, Path("evolved"), drift=0.03)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reader / name, changed / name)
    make_adapter(reader, Path("adapter"), size=0.2)
    portllm("capture", "--adapter", "adapter", "--base", "base", "-o", "patch")
    portllm("port", "patch", "--evolved", "evolved", "-o", "ported")
    rows = [{"q": f"{asks} {thing}", "kind": "tea"} for asks in ("what is", "who has") for thing in ("tea", "rest")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sides = ("--base", "base", "--patch", "patch", "--evolved", "evolved", "--ported", "ported")
    asked = ("certify", *sides, "--data", "rows.jsonl", "--prompt", "{q}? Kind:", "--device", "cpu")
    portllm(*asked, "--completion", "kind", "--choices", "cause,tea", "--sample", "3", "-o", folder / "certificate")
    portllm(*asked, "--answers", "free", "--max-new-tokens", "3", "-o", folder / "certificate-free")

    shorter = {"seeds = [0, 1]": "seeds = [0]", "links = 2": "links = 1"}
    file = write_study(Path(), "base", top="keep = []", more="[check]\n", replace=shorter)
    (folder / "study").mkdir()
    out = folder / "study" / "out"
    portllm("study", "run", shutil.copy(file, folder / "study"), "-o", out, "--data", ".", "--device", "cpu", "-q")
    for left in [*out.glob(".*"), out / "machine.json"]:
        left.unlink()


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute())
