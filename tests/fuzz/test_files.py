"""No file hurts the program: whatever bytes stand where it reads, it succeeds or says what is wrong, in bounded memory.

Each target begins with a whole file and changes it: a value of its JSON becomes another one, a key goes, comes twice or
is renamed, bytes flip, go or repeat. `PORTLLM_FUZZ_EXAMPLES` says how many examples each target gets.
"""

import copy
import json
import os
import random
import signal
import sys
import tracemalloc
from collections import Counter
from contextlib import contextmanager, suppress

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import asdict

from portllm.certifying.bounds import upper_bound
from portllm.certifying.certificate import count_labels, read_certificate
from portllm.certifying.decision import decide
from portllm.certifying.text import render_certificate
from portllm.checkpoint.gguf.file import open_gguf
from portllm.checkpoint.model.identity import digest_tensor, remember_digests, tensor_digests
from portllm.checkpoint.open import open_checkpoint
from portllm.checkpoint.safetensors.names import INDEX_FILE
from portllm.checkpoint.vocabulary import read_vocabulary
from portllm.errors import PortLLMError
from portllm.files.kept_results import read_record
from portllm.files.record import encode
from portllm.files.seal import render_sealed
from portllm.files.staging import Journal
from portllm.files.typed import decode
from portllm.fleets.file import read_fleet_file
from portllm.fleets.plan import FORMAT, FleetRow
from portllm.fleets.state import read_state
from portllm.inspecting.inspect import inspect, summary_to_json
from portllm.merging.tensor import TensorResults
from portllm.patch.adapter_folder import load_patch, parse_record, stored_tensors, write_patch
from portllm.running.examples import ExampleFormat, read_examples
from portllm.study.definition.file import read_study
from portllm.verifying.checks import verification_to_json
from portllm.verifying.verify import verify
from tests.safetensors_files import file_bytes, write_tensors

EXAMPLES = int(os.environ.get("PORTLLM_FUZZ_EXAMPLES", "400"))
BYTES_PER_BYTE = 64
"""What a value of Python takes, for each byte of JSON that makes it: an empty list in three bytes is the worst."""

LEAST_BYTES = 8_000_000
"""Digests are taken in parts of four megabytes."""

HANGS_AFTER_SECONDS = 60
"""An example takes milliseconds; what takes this long never ends."""

FACTORS = {
    f"base_model.model.h.{layer}.q_proj.lora_{name}.weight": tensor
    for layer in range(2)
    for name, tensor in {"A": ("F32", (2, 3), bytes(24)), "B": ("BF16", (5, 2), bytes(20))}.items()
}
WEIGHTS = {
    "model.embed_tokens.weight": ("BF16", (4, 2), bytes(16)),
    "model.layers.0.self_attn.q_proj.weight": ("F32", (3, 2), bytes(24)),
    "model.norm.weight": ("F16", (2,), bytes(4)),
}
CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {r"h\.1\.q_proj": 2},
    "alpha_pattern": {"h.0.q_proj": 3.5}, "use_rslora": False, "bias": "none", "modules_to_save": None,
    "exclude_modules": "k_proj", "layers_to_transform": None, "layers_pattern": None, "task_type": "CAUSAL_LM",
    "trainable_token_indices": None, "init_lora_weights": True, "base_model_name_or_path": "org/base",
    "revision": "main", "target_parameters": None, "lora_bias": False, "fan_in_fan_out": False, "use_dora": False,
}  # fmt: skip
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True, "vocab_size": 4,
    "text_config": {"tie_word_embeddings": False}, "torch_dtype": "bfloat16",
}  # fmt: skip
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "é": 2}, "merges": [["a", "b"]]},
    "added_tokens": [{"id": 3, "content": "<end>", "special": True}],
}
MARK = {"name": "base", "fingerprint": "s4k1:" + "0" * 40, "digest": "blake3:" + "1" * 64, "revision": "2" * 40}
RECORD = {
    "format": 1, "program": "0.1.0", "base": MARK,
    "capture": {"method": "combine", "settings": {"method": "ties", "weights": [1.0, 2.5], "patches": [MARK]}},
    "ports": [{"from": MARK, "to": MARK, "method": "add", "evidence": {"sampled_drift": 0.25},
               "left_out": {"lm_head.weight": ["<a>", "b"]}}],
    "tensors": dict.fromkeys(FACTORS, "3" * 64),
    "files": {"adapter_config.json": "4" * 64, "adapter_model.safetensors": "5" * 64},
}  # fmt: skip
MANIFEST = {
    "output": MARK, "into": MARK, "files": {"config.json": "6" * 64}, "dtype": ["BF16"], "rounding": "nearest",
    "patch": None, "tensors": {"model.norm.weight": {"kept_gain": 0.99}},
}  # fmt: skip

CERTIFICATE = {
    "format": 1, "program": "0.1.0", "assumes": "independent draws", "specialist": {"model": MARK, "patch": {
        "name": "patch", "files": {"adapter_config.json": "4" * 64, "adapter_model.safetensors": "5" * 64}}},
    "ported": {"model": MARK, "patch": None},
    "inputs": {"digest": "blake3:" + "7" * 64, "rows": 24, "prompt": "{q}", "completion": "a", "sample": None,
               "seed": None, "repeated": 0, "cut": 0},
    "answers": {"kind": "choices", "choices": ["a", "b"], "choices_from": "given", "one_line": False, "max_tokens": 512,
                "max_new_tokens": 32, "batch_size": 16},
    "confidence": 0.95, "n": 24, "k": 2, "differing": [3, 7], "bound": upper_bound(2, 24), "wanted": 0.5,
    "labels": asdict(count_labels(1, 1, 20, 24, confidence=0.95)), "tokens": None, "device": "cpu",
}  # fmt: skip

FLEET = """
patches = [ "a" , "b/*" ]
evolved = [ "org/new" , "c" ]
base = "org/old"
do = [ "check" , "port" , "merge" ]
output = "out"
[check]
full = true
[port]
method = "add"
[merge]
dtype = "BF16"
"""
STUDY = """
title = "a study"
base = "builtin:smollm2-135m"
[patch]
rank = 4
epochs = 1.0
[tasks.questions]
kind = "rows"
train = "train.jsonl"
score = "test.jsonl"
prompt = "{q}"
completion = "a"
train_rows = 20
score_rows = 10
[evolutions.more]
kind = "full"
text = "text.jsonl"
steps = 4
"""
STATE = {
    "format": FORMAT, "program": "0.1.0", "cells": [
        {"folder": "a/b", "key": "0" * 32, "status": "done", "facts": {"port": {"tensors": 2}}, "files": {"x": 1},
         "records": {"patch.json": "1" * 64}, "reason": None, "attempts": ["lost"], "seconds": 0.5, "kept": False}],
}  # fmt: skip
KEPT = {"inputs": {"versions": {"portllm": "0.1.0"}, "seed": 0}, "files": "s4k1:" + "0" * 40, "seconds": 1.5,
        "result": {"loss": 0.5}}  # fmt: skip
JOURNAL = (
    {"format": 1, "folder": 12345, "plan": "0" * 64},
    {"file": "model.safetensors", "facts": {"read": {"w": "1" * 64}, "written": {"w": "2" * 64}, "sums": {"w": [1.0]}}},
)
ROWS = ({"q": "why?", "n": 5, "a": "so"}, {"q": "é", "n": 1e5, "a": "no"}, {"q": "x", "n": True, "a": "yes"})

STRINGS = (
    "", "..", "../x", "/etc/passwd", "\0", "\x1b[2J", "a\nb", "\ud800", "\u202e", "x" * 5000, "(a+)+$", "(",
    "a{9999999}", "((a*)*)*\\1", ".*" * 30 + "x", "[[a]", "(?i)a", "q_proj", "all-linear", "F32", "F4", "LORA",
    "none", "all", "lora_only", "__metadata__", "model.norm.weight", "h.0.q_proj.weight", "s4k1:" + "0" * 40, "0" * 64,
    "model.safetensors", "\\" * 50, "١٢", "😀",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 24, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**299, 10**400,
    -(10**400),    0.5, -0.0, 1e308, -1e308, 5e-324, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
DEEP = json.loads("[" * 70 + "]" * 70)
VALUES = (
    None, True, False, [], {}, [[]], [{}], [None], [True], ["q_proj"], [0, 24], [24, 0], [[], {}], {"": ""},
    {"a": {"b": []}},    [0] * 2000, ["h.0.q_proj"] * 2000, {f"k{i}": i for i in range(2000)}, DEEP,
    *STRINGS, *NUMBERS,
)  # fmt: skip

changes = st.lists(
    st.tuples(
        st.sampled_from(["value", "key", "drop", "copy", "swap", "twice", "flip", "cut", "double", "insert"]),
        st.integers(0, 2**16 - 1),
        st.one_of(st.integers(0, len(VALUES) - 1), st.integers(0, 2**16 - 1)),
    ),
    max_size=6,
)


def places(value, found=None):
    """Every container of a JSON value with each of its keys."""
    found = [] if found is None else found
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        if len(found) < 5000:
            found.append((value, key))
            places(value[key], found)
    return found


class Twice(str):
    """A key that is another one to a dict, and the same in JSON."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


def changed_value(value, changes):
    """A JSON value with some of its parts changed."""
    root = [copy.deepcopy(value)]
    for kind, place, choice in changes:
        found = places(root)
        if not found:
            break
        inside, key = found[place % len(found)]
        other, another = found[choice % len(found)]
        match kind:
            case "value":
                inside[key] = copy.deepcopy(VALUES[choice % len(VALUES)])
            case "key" if isinstance(inside, dict):
                inside[STRINGS[choice % len(STRINGS)]] = inside.pop(key)
            case "drop":
                del inside[key]
            case "copy" if len(json.dumps(other[another])) < 3000:
                inside[key] = copy.deepcopy(other[another])
            case "swap" if isinstance(inside[key], str | int | float | None) and isinstance(
                other[another], str | int | float | None
            ):
                inside[key], other[another] = other[another], inside[key]
            case "twice" if isinstance(inside, dict):
                inside[Twice(key)] = copy.deepcopy(VALUES[choice % len(VALUES)])
    return root[0] if root else None


def changed_bytes(content, changes):
    """A file with some of its bytes changed."""
    content = bytearray(content)
    for kind, place, choice in changes:
        at = place * len(content) // 2**16
        match kind:
            case "flip" if content:
                content[at] ^= 1 << choice % 8
            case "cut":
                del content[at : at + choice % 64]
            case "double":
                content[at:at] = content[at : at + choice % 200] * 2
            case "insert":
                content[at:at] = random.Random(choice).choice(
                    [bytes(8), b"\xff" * 8, b"[" * 500, b'"', b"\xef\xbb\xbf", b" "]
                )
    return bytes(content)


def json_bytes(value, changes):
    """JSON of a changed value, its bytes changed in turn."""
    return changed_bytes(json.dumps(changed_value(value, changes)).encode("utf-8", "surrogatepass"), changes)


def header_bytes(tensors, changes, *, metadata=None):
    """A safetensors file whose header, length and bytes are changed."""
    entries, position, data = {"__metadata__": metadata or {"format": "pt"}}, 0, b""
    for name, (dtype, shape, content) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(content)]}
        position += len(content)
        data += content
    text = json.dumps(changed_value(entries, changes)).encode("utf-8", "surrogatepass")
    return changed_bytes(file_bytes(text, data), changes)


@contextmanager
def bounded(n_bytes):
    """The block ends, and takes no more memory than so many bytes of input may."""

    def stop(*_):
        raise AssertionError(f"still busy after {HANGS_AFTER_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS_AFTER_SECONDS)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert peak < LEAST_BYTES + BYTES_PER_BYTE * n_bytes, f"{peak} bytes of memory for {n_bytes} bytes of input"


def survives(read, n_bytes):
    """Whether reading succeeds; it may fail in no way but our own, and print in any case."""
    told = None
    with bounded(n_bytes):
        try:
            read()
        except PortLLMError as error:
            told = str(error)
    assert told != ""
    return told is None


def model_at(folder):
    """Opens a model and uses all that it says of itself."""

    def read():
        json.dumps(summary_to_json(inspect(folder))).encode()

    return read


def adapter_at(folder):
    """Opens an adapter and uses all that it says of itself, but for writing."""

    def read():
        patch = load_patch(folder)
        stored_tensors(patch)
        patch.config.targets(["h.0.q_proj", "h.1.k_proj", "lm_head", "a" * 80])
        json.dumps(summary_to_json(inspect(folder)), allow_nan=False).encode()
        out = folder / "written"
        out.mkdir(exist_ok=True)
        write_patch(out, patch, base_name="base")

    return read


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Adapters, models, a patch, a merged model and a certificate, one file of which a target writes anew."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("adapter", "model", "sharded", "patch", "merged", "certified"):
        (folder / name).mkdir()
    for name in ("adapter", "patch"):
        (folder / name / "adapter_config.json").write_text(json.dumps(CONFIG))
        write_tensors(folder / name / "adapter_model.safetensors", FACTORS)
    for name in ("model", "merged"):
        (folder / name / "config.json").write_text(json.dumps(MODEL_CONFIG))
        write_tensors(folder / name / "model.safetensors", WEIGHTS)
    write_tensors(folder / "sharded" / "a.safetensors", WEIGHTS)
    return folder


def header_of_a_model(folder, changes):
    (folder / "model" / "model.safetensors").write_bytes(content := header_bytes(WEIGHTS, changes))
    return model_at(folder / "model"), content


def index(folder, changes):
    shown = {"metadata": {"total_size": 44}, "weight_map": dict.fromkeys(WEIGHTS, "a.safetensors")}
    (folder / "sharded" / INDEX_FILE).write_bytes(content := json_bytes(shown, changes))
    return model_at(folder / "sharded"), content


def configuration_of_a_model(folder, changes):
    (folder / "model" / "config.json").write_bytes(content := json_bytes(MODEL_CONFIG, changes))
    write_tensors(folder / "model" / "model.safetensors", WEIGHTS)
    return model_at(folder / "model"), content


def vocabulary(folder, changes):
    (folder / "model" / "config.json").write_text(json.dumps(MODEL_CONFIG))
    write_tensors(folder / "model" / "model.safetensors", WEIGHTS)
    (folder / "model" / "tokenizer.json").write_bytes(content := json_bytes(TOKENIZER, changes))

    def read():
        rows = read_vocabulary(open_checkpoint(folder / "model"))
        assert rows is None or all(isinstance(token, str) and 0 <= row < 2**31 for token, row in rows.items())

    return read, content


def configuration_of_an_adapter(folder, changes):
    (folder / "adapter" / "adapter_config.json").write_bytes(content := json_bytes(CONFIG, changes))
    write_tensors(folder / "adapter" / "adapter_model.safetensors", FACTORS)
    return adapter_at(folder / "adapter"), content


def header_of_an_adapter(folder, changes):
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(content := header_bytes(FACTORS, changes))
    return adapter_at(folder / "adapter"), content


def sealed(value, changes):
    """A file whose seal fits what it says, where that can be sealed, so that the seal does not hide the rest."""
    said = changed_value(value, changes)
    if not isinstance(said, dict):
        return json_bytes(value, changes)
    try:
        return changed_bytes(render_sealed(said).encode("utf-8", "surrogatepass"), changes)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return json_bytes(value, changes)


def record(folder, changes):
    (folder / "patch" / "patch.json").write_bytes(content := sealed(RECORD, changes))

    def read():
        verification_to_json(verify(folder / "patch"))
        found = load_patch(folder / "patch").record
        parse_record({**encode(found), "seal": "blake3:" + "0" * 64}, where="written")

    return read, content


def manifest(folder, changes):
    (folder / "merged" / "portllm.json").write_bytes(content := sealed(MANIFEST, changes))
    return lambda: verification_to_json(verify(folder / "merged")), content


def certificate(folder, changes):
    (folder / "certified" / "certificate.json").write_bytes(content := sealed(CERTIFICATE, changes))

    def read():
        verification_to_json(verify(folder / "certified"))
        read = read_certificate(folder / "certified")
        render_certificate(read, folder, decide(read))

    return read, content


def gguf(folder, changes):
    (folder / "m.gguf").write_bytes(content := changed_bytes(whole_gguf(folder), changes))

    def read():
        opened = open_gguf(folder / "m.gguf")
        assert len(opened.header.tensors) < 100
        for key in opened.keys(""):
            for ask in (opened.text, opened.flag, opened.integer, opened.positive, opened.texts, opened.integers):
                survives_asking(ask, key)

    return read, content


def survives_asking(ask, key):
    with suppress(PortLLMError):
        ask(key)


def whole_gguf(folder):
    """The bytes of a small GGUF file."""
    import gguf as library
    import numpy as np

    file = folder / "whole.gguf"
    if not file.exists():
        writer = library.GGUFWriter(file, "llama")
        writer.add_uint32("llama.block_count", 2)
        writer.add_float32("llama.rope.freq_base", 1e4)
        writer.add_bool("tokenizer.ggml.add_bos_token", True)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b", "é"])
        writer.add_array("tokenizer.ggml.token_type", [1, 3, 1])
        writer.add_string("general.name", "tiny")
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
        writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 3), dtype=np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return file.read_bytes()


def toml_bytes(text, changes):
    """A TOML file with some of its bytes, words and values changed."""
    words = text.split(" ")
    for kind, place, choice in changes:
        if kind in ("value", "key", "swap"):
            value = VALUES[choice % len(VALUES)]
            words[place % len(words)] = json.dumps(value) if kind == "value" else str(value)
    return changed_bytes(" ".join(words).encode("utf-8", "surrogatepass"), changes)


def fleet(folder, changes):
    (folder / "fleet.toml").write_bytes(content := toml_bytes(FLEET, changes))
    return lambda: read_fleet_file(folder / "fleet.toml"), content


def study(folder, changes):
    (folder / "study.toml").write_bytes(content := toml_bytes(STUDY, changes))
    return lambda: read_study(folder / "study.toml"), content


def state_of_a_fleet(folder, changes):
    (folder / "fleet.json").write_bytes(content := sealed(STATE, changes))

    def read():
        assert all(isinstance(row, FleetRow) for row in read_state(str(folder)).values())

    return read, content


def kept_result(folder, changes):
    (folder / "kept.json").write_bytes(content := json_bytes(KEPT, changes))

    def read():
        found = read_record(folder / "kept.json")
        assert found is None or isinstance(found.inputs, dict)

    return read, content


def digests(folder, changes):
    """An entry of the cache of digests, for a file that is as the entry says."""
    os.environ["PORTLLM_CACHE"] = str(folder / "cache")
    write_tensors(folder / "model" / "model.safetensors", WEIGHTS)
    (folder / "model" / "config.json").write_text(json.dumps(MODEL_CONFIG))
    opened = open_checkpoint(folder / "model")
    expected = {info.name: digest_tensor(info) for info in opened.infos.values()}
    remember_digests(opened, expected)
    (entry,) = (folder / "cache" / "digests").iterdir()
    entry.write_bytes(content := json_bytes(json.loads(entry.read_text()), changes))

    def read():
        assert tensor_digests(opened) == expected

    return read, content


def journal(folder, changes):
    """The journal of a part that is being written; each line has a digest of its own that fits."""
    lines = [changed_bytes(json.dumps(changed_value(value, changes)).encode("utf-8", "surrogatepass"), changes)
             for value in JOURNAL]  # fmt: skip
    content = b"".join(blake3(line).hexdigest(8).encode() + b" " + line + b"\n" for line in lines)
    (folder / "journal").write_bytes(content)

    def read():
        found = Journal(folder / "journal")
        found.close()
        assert found.plan is None or isinstance(found.plan, str)
        for facts in found.finished.values():
            with suppress(ValueError, TypeError):
                decode(TensorResults, facts)

    return read, content


def rows(folder, changes):
    (folder / "rows.jsonl").write_bytes(content := b"\n".join(json_bytes(row, changes) for row in ROWS))

    def read():
        for example in read_examples(folder / "rows.jsonl", ExampleFormat("{q} {n}", "a")):
            example.prompt.encode()
            example.completion.encode()

    return read, content


TARGETS = (
    header_of_a_model, index, configuration_of_a_model, vocabulary, configuration_of_an_adapter, header_of_an_adapter,
    record, manifest, certificate, gguf, fleet, study, state_of_a_fleet, kept_result, digests, journal, rows,
)  # fmt: skip


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_the_file_that_nobody_changed_is_read(target, room):
    read, content = target(room, [])
    assert survives(read, len(content))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_no_file_does_harm(target, room, capsys):
    outcomes = Counter()

    @given(changes)
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize="PORTLLM_FUZZ_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    def harmless(changes):
        read, content = target(room, changes)
        outcomes[survives(read, len(content))] += 1

    harmless()
    with capsys.disabled():
        counts = f"{outcomes.total()} files, {outcomes[False]} refused, {outcomes[True]} read"
        sys.stdout.write(f"\n{target.__name__}: {counts}\n")
