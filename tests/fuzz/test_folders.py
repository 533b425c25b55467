"""No folder hurts the program where transformers, tokenizers and PEFT read it: it is used, or refused in our words.

Each input is a tiny model and an adapter, one file of which is changed as in `test_files`, or is given fields that some
loader acts on. The inputs follow from a seed. `PORTLLM_FUZZ_EXAMPLES` says how many there are.
"""

import json
import os
import random
import sys
from collections import Counter

import pytest

from portllm.errors import PortLLMError
from tests.fuzz.test_files import VALUES, json_bytes
from tests.language import make_reader
from tests.models import make_adapter
from tests.strangers import copied, nothing_happens, use

INPUTS = int(os.environ.get("PORTLLM_FUZZ_EXAMPLES", "300"))

FILES = {
    "config.json": 5, "tokenizer.json": 4, "tokenizer_config.json": 3, "adapter_config.json": 3,
    "generation_config.json": 1, "special_tokens_map.json": 1, "added_tokens.json": 1,
}  # fmt: skip
"""Each with how often it is the one, of all together."""

ACTED_ON = (
    "_attn_implementation", "_experts_implementation", "add_prefix_space", "added_tokens_decoder", "adapter_kwargs",
    "arrow_config", "attn_implementation", "auto_map", "auto_mapping", "backbone", "base_model_name_or_path",
    "cache_implementation", "chat_template", "distributed_config", "dtype", "eos_token", "eos_token_id", "eva_config",
    "experts_implementation", "extra_special_tokens", "fusion_config", "gguf_file", "hidden_act", "id2label",
    "init_lora_weights", "layer_replication", "layer_types", "loftq_config", "max_position_embeddings",
    "megatron_config", "megatron_core", "merges", "model_max_length", "model_type", "name_or_path", "num_labels",
    "per_layer_config", "problem_type", "pruned_heads", "quantization_config", "rank_pattern", "return_dict",
    "revision", "rope_parameters", "rope_scaling", "runtime_config", "sliding_window", "tie_word_embeddings",
    "tokenizer_class", "torch_dtype", "trainable_token_indices", "transformers_weights", "vocab", "vocab_file",
)  # fmt: skip

CHANGES = ("value", "key", "drop", "copy", "swap", "twice", "flip", "cut", "double", "insert")


def changed(whole, chance):
    """A file that begins as the whole one."""
    if chance.random() < 0.5:
        values = (*VALUES, "kernels-community/a", "org/name", {"quant_method": "fp8"}, ["evil.C", "evil.C"], "mamba")
        given = {chance.choice(ACTED_ON): chance.choice(values) for _ in range(chance.randint(1, 3))}
        return json.dumps(whole | given).encode("utf-8", "surrogatepass")
    kinds = [chance.choice(CHANGES) for _ in range(chance.randint(1, 4))]
    return json_bytes(whole, [(kind, chance.randrange(2**16), chance.randrange(2**16)) for kind in kinds])


@pytest.mark.slow
def test_no_folder_does_harm(tmp_path, monkeypatch, capsys):
    model, counts = make_reader(tmp_path / "model"), Counter()
    adapter = make_adapter(model, tmp_path / "patch")
    for number in range(INPUTS):
        chance = random.Random(number)
        name = chance.choices(list(FILES), list(FILES.values()))[0]
        original = adapter if name.startswith("adapter") else model
        whole = json.loads((original / name).read_text()) if (original / name).exists() else {"<new>": 331}
        room = tmp_path / str(number)
        folder = copied(original, room / "changed", {name: changed(whole, chance)})
        told = None
        with nothing_happens(room, monkeypatch):
            try:
                use(*((model, folder) if original is adapter else (folder, adapter)))
            except PortLLMError as error:
                told = str(error)
            except Exception as error:
                raise AssertionError(f"input {number}, {folder / name}") from error
        assert told != ""
        counts[name, "used" if told is None else "refused"] += 1
    told = ", ".join(f"{name} {fate} {count}" for (name, fate), count in sorted(counts.items()))
    with capsys.disabled():
        sys.stdout.write(f"\n{INPUTS} folders: {told}\n")
