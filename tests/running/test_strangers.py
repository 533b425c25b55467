"""A stranger's folder can do nothing: each file of it is refused in our words or changes nothing that it should not."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from portllm.errors import CheckpointError, PortLLMError
from portllm.patch import name_pattern
from portllm.running.encoding import Encoder
from portllm.running.model import attach_adapter, load_model, load_tokenizer
from tests.models import make_adapter
from tests.strangers import CPU, copied, nothing_happens, use

EVIL = "open('pwned', 'w')\nclass C: pass\n"


def tokenizer_with(**parts):
    """A change of `tokenizer.json` that a case makes, as it would stand there."""
    return {"tokenizer.json": parts}


def split(pattern):
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


UNKNOWN_MARK = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}], "pair": [],
                "special_tokens": {}}  # fmt: skip

REFUSED = {
    "tokenizer: a list": {"tokenizer.json": "[]"},
    "tokenizer: nothing": {"tokenizer.json": "{}"},
    "tokenizer: bytes": {"tokenizer.json": b"\xff\x00"},
    "tokenizer: deep": {"tokenizer.json": "[" * 5000 + "]" * 5000},
    "tokenizer: many values": {"tokenizer.json": "[" + "0," * 6_000_000 + "0]"},
    "tokenizer: an unknown model": tokenizer_with(model={"type": "Evil"}),
    "tokenizer: a broken pattern": tokenizer_with(**split("(((")),
    "tokenizer: a pattern without end": tokenizer_with(**split("(.+)+$(?<=x)")),
    "tokenizer: a mark without an id": tokenizer_with(post_processor=UNKNOWN_MARK),
    "tokenizer: ids without rows": tokenizer_with(added_tokens=[
        {"id": 0, "content": "<pad>", "special": True}, {"id": 330, "content": "what", "special": False,
         "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}]),
    "tokenizer_config: a list": {"tokenizer_config.json": "[]"},
    "tokenizer_config: not UTF-8": {"tokenizer_config.json": b"\xff\xfe"},
    "tokenizer_config: an end of text that is a number": {"tokenizer_config.json": {"eos_token": 5}},
    "tokenizer_config: added tokens in a list": {"tokenizer_config.json": {"added_tokens_decoder": [1]}},
    "tokenizer_config: code": {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]},
                               "tokenizer_class": "C"}, "evil.py": EVIL},
    "special_tokens_map: a list": {"special_tokens_map.json": "[]"},
    "added_tokens: a list": {"added_tokens.json": "[]"},
    "config: a type of its own": {"config.json": {"model_type": "evil", "auto_map": {
        "AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}, "evil.py": EVIL},
    "config: no heads": {"config.json": {"num_attention_heads": 0}},
    "config: heads in words": {"config.json": {"num_attention_heads": "2"}},
    "config: an unknown activation": {"config.json": {"hidden_act": "evil"}},
    "config: unknown positions": {"config.json": {"rope_parameters": {"rope_type": "evil", "rope_theta": 1.0}}},
    "config: ten million layers": {"config.json": {"num_hidden_layers": 10**7}},
    "config: a thousand layers": {"config.json": {"num_hidden_layers": 1000}},
    "config: a layer too many": {"config.json": {"num_hidden_layers": 3}},
    "config: fewer than no layers": {"config.json": {"num_hidden_layers": -1}},
    "config: gigantic states": {"config.json": {"hidden_size": 2**40}},
    "config: gigantic layers": {"config.json": {"intermediate_size": 2**33}},
    "config: a gigantic vocabulary": {"config.json": {"vocab_size": 10**12}},
    "config: padding without a row": {"config.json": {"pad_token_id": 10**6}},
    "config: a list of words": {"config.json": {"eos_token_id": ["x"]}},
    "config: an encoder": {"config.json": {"model_type": "t5"}},
    "config: a speaker": {"config.json": {"model_type": "wav2vec2"}},
    "config: takes no positions": {"config.json": {"model_type": "mamba"}},
    "config: GPTQ": {"config.json": {"quantization_config": {"quant_method": "gptq", "bits": 4}}},
    "config: FP8, by a kernel": {"config.json": {"quantization_config": {"quant_method": "fp8"}}},
    "config: MXFP4, by a kernel": {"config.json": {"quantization_config": {"quant_method": "mxfp4"}}},
    "config: too large": {"config.json": {"x": ["y" * 1000] * 9000}},
    "generation_config: a list": {"generation_config.json": "[]"},
}  # fmt: skip

PASSED_OVER = {
    "tokenizer_config: an unknown class": {"tokenizer_config.json": {"tokenizer_class": "EvilTokenizer"}},
    "tokenizer_config: a class that is no tokenizer": {"tokenizer_config.json": {"tokenizer_class": "Trainer"}},
    "tokenizer_config: a class that is a number": {"tokenizer_config.json": {"tokenizer_class": 7}},
    "tokenizer_config: a length in words": {"tokenizer_config.json": {"model_max_length": "x"}},
    "tokenizer_config: files elsewhere": {"tokenizer_config.json": {"gguf_file": "/etc/passwd", "vocab": "/etc/passwd",
                                          "tokenizer_file": "/etc/passwd", "init_inputs": [1]}},
    "tokenizer_config: a template": {"tokenizer_config.json": {"chat_template": [1]}},
    "a template": {"chat_template.jinja": "{% for i in range(10**12) %}{{ ''.__class__.__mro__ }}{% endfor %}"},
    "config: code": {"config.json": {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}},
                     "evil.py": EVIL},
    "config: attention by a kernel": {"config.json": {"attn_implementation": "kernels-community/any-name"}},
    "config: attention of a part by a kernel": {"config.json": {"attn_implementation": {"": "kernels-community/a"}}},
    "config: attention inside": {"config.json": {"_attn_implementation": "kernels-community/a",
                                 "_attn_implementation_internal": "kernels-community/a", "attn_config": {}}},
    "config: experts by a kernel": {"config.json": {"experts_implementation": "sonicmoe"}},
    "config: names of its own": {"config.json": {"attribute_map": {"hidden_size": "vocab_size"}, "to_dict": 1}},
    "config: an unknown dtype": {"config.json": {"dtype": "os.system"}},
    "config: labels": {"config.json": {"id2label": 5, "num_labels": 10**12}},
    "config: outputs of other kinds": {"config.json": {"return_dict": False, "output_attentions": True}},
    "config: plans": {"config.json": {"base_model_tp_plan": 5, "distributed_config": {"tp_size": 8}}},
    "config: other weights": {"config.json": {"transformers_weights": "other.safetensors"}},
    "config: a layer of its own": {"config.json": {"per_layer_config": {"0": {"attn_implementation": "a/b"}}}},
    "generation_config: an unknown cache": {"generation_config.json": {"cache_implementation": "evil"}},
    "generation: code": {"custom_generate/generate.py": EVIL},
    "another model's adapter": {"adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "org/other"}'},
    "pickles beside the weights": {"pytorch_model.bin": b"cos\nsystem\n", ".metadata": b"cos\nsystem\n"},
}  # fmt: skip

REFUSED_ADAPTERS = {
    "another kind": {"peft_type": "EVIL"},
    "prompts": {"peft_type": "PROMPT_TUNING"},
    "a module to import": {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
    "other adapters": {"arrow_config": {"arrow_top_k": 1}},
    "more layers": {"layer_replication": [[0, 2], [0, 2]]},
    "another base, computed": {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 10**9}},
    "a gigantic rank": {"r": 2**30, "rank_pattern": {"q_proj": 4}, "target_modules": ["q_proj", "k_proj"]},
    "a pattern without end": {"target_modules": "(.*.*.*.*.*.*)*q_proj"},
    "rows without a row": {"trainable_token_indices": [10**9]},
}


@pytest.fixture(scope="module")
def adapter(reader, tmp_path_factory):
    return make_adapter(reader, tmp_path_factory.mktemp("patch"))


def test_the_folder_that_nobody_changed_is_used(reader, adapter, monkeypatch):
    with nothing_happens(reader, monkeypatch):
        use(reader, adapter)


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_model_has_is_refused_with_its_place(case, reader, adapter, tmp_path, monkeypatch):
    model = copied(reader, tmp_path / "model", REFUSED[case])
    with nothing_happens(tmp_path, monkeypatch), pytest.raises(PortLLMError, match=str(model)):
        use(model, adapter)


@pytest.mark.parametrize("case", PASSED_OVER)
def test_what_may_not_pass_changes_nothing(case, reader, adapter, tmp_path, monkeypatch):
    model = copied(reader, tmp_path / "model", PASSED_OVER[case])
    with nothing_happens(tmp_path, monkeypatch):
        use(model, adapter)


@pytest.mark.parametrize("case", REFUSED_ADAPTERS)
def test_an_adapter_that_asks_for_more_than_its_tensors_is_refused(case, reader, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(name_pattern, "TRIAL_SECONDS", 0.5)
    asked = copied(adapter, tmp_path / "patch", {"adapter_config.json": REFUSED_ADAPTERS[case]})
    with nothing_happens(tmp_path, monkeypatch), pytest.raises(PortLLMError, match=str(asked)):
        use(reader, asked)


def test_an_adapter_s_other_fields_do_not_reach_peft(reader, adapter, tmp_path, monkeypatch):
    said = {"auto_mapping": {"parent_library": "antigravity", "base_model_class": "C"}, "runtime_config": {"a": 1}}
    asked = copied(adapter, tmp_path / "patch", {"adapter_config.json": said | {"revision": "evil"}})
    with nothing_happens(tmp_path, monkeypatch):
        attached = attach_adapter(load_model(reader, device=CPU), asked, name="patch")
    config = attached.peft_config["patch"]
    assert (config.auto_mapping, config.revision, "antigravity" in sys.modules) == (None, None, False)


def test_a_model_keeps_the_name_of_its_folder(reader):
    model, tokenizer = load_model(reader, device=CPU), load_tokenizer(reader)
    assert model.name_or_path == model.config.name_or_path == tokenizer.name_or_path == str(reader)


def test_a_position_without_a_row_is_refused(tmp_path, reader):
    encoder = Encoder(load_tokenizer(reader))
    config = GPT2Config(vocab_size=330, n_positions=8, n_embd=6, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    ids = encoder.encode_text("What helps against a cold? " * 2)
    model = load_model(tmp_path, device=CPU)
    with pytest.raises(CheckpointError, match=r"'transformer\.wpe' has 8 rows, but row"):
        model(input_ids=torch.tensor([ids]))


def test_what_is_no_fault_of_a_file_passes_as_it_is(reader, monkeypatch):
    def interrupted(*_, **__):
        raise kind

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", interrupted)
    for kind in (KeyboardInterrupt, SystemExit, MemoryError):
        with pytest.raises(kind):
            load_tokenizer(reader)


STAND_IN = """
import sys
def get_kernel(*a, **k): print('KERNEL ASKED FOR', a); raise RuntimeError('stand-in')
def __getattr__(n):
    if n.startswith('__'): raise AttributeError(n)
    if n[0].isupper(): return type(n, (), {'__init__': lambda self, *a, **k: None, '__getattr__': lambda self, m: None})
    return lambda *a, **k: (lambda c: c)
"""

ASK = """
import json, sys, torch
from pathlib import Path
from portllm.errors import PortLLMError
from portllm.running.model import load_model
folder = Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
for fields in json.loads(sys.argv[2]):
    (folder / "config.json").write_text(json.dumps(config | fields))
    try:
        load_model(folder, device=torch.device("cpu"), longest=1000)
    except PortLLMError as error:
        print("refused", str(error)[:200])
"""


@pytest.mark.slow
def test_no_kernel_is_asked_for_where_the_package_for_them_is_installed(reader, tmp_path):
    copied(reader, tmp_path / "model", {})
    package, info = tmp_path / "packages" / "kernels", tmp_path / "packages" / "kernels-0.18.2.dist-info"
    for folder in (package, info):
        folder.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    types = [{"model_type": name} for name in ("mamba", "falcon_mamba", "jamba", "rwkv")]
    asking = [{"attn_implementation": "kernels-community/a"}, {"experts_implementation": "sonicmoe"}, *types]
    path = os.pathsep.join([str(tmp_path / "packages"), *filter(None, sys.path)])
    ran = subprocess.run(
        [sys.executable, "-c", ASK, str(tmp_path / "model"), json.dumps(asking)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert (ran.returncode, "KERNEL" in ran.stdout) == (0, False), ran.stderr
    assert ran.stdout.count("refused") == len(types)
