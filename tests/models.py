"""Tiny seeded checkpoints and adapters, made by transformers and peft themselves.

Two layers, hidden 12, inner 20, three query heads and one key head of 6, vocabulary 31: the query projection is
18x12, the key 6x12, the output 12x18. No matrix is square, so a swapped axis fails. Everything is a function of its
arguments: the same call makes the same bytes.
"""

import copy
from functools import lru_cache
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()

HIDDEN, INNER, HEADS, KEY_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 12, 20, 3, 1, 6, 2, 31

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Module names of one layer that LoRA is usually put on."""

SHAPES = {
    "q_proj": (18, 12),
    "k_proj": (6, 12),
    "v_proj": (6, 12),
    "o_proj": (12, 18),
    "gate_proj": (20, 12),
    "up_proj": (20, 12),
    "down_proj": (12, 20),
}
"""(d_out, d_in) of their weights."""

CARD = "---\nlibrary_name: peft\n---\n\nAn adapter.\n"

SEVERAL_SHARDS = "3KB"
"""A `max_shard_size` that splits a tiny checkpoint into more than two files, whatever its dtype."""


def llama_config(*, tied=True, layers=LAYERS, hidden=HIDDEN, inner=INNER, attention_bias=False):
    """The configuration of a tiny Llama."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def fill_at_random(parameters, *, seed, size, mean=0.0):
    """Overwrites each parameter with seeded normal values, in the order of their names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(parameters, key=lambda pair: pair[0]):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size + mean)


def gpt2_config(*, layers=LAYERS, inner=INNER):
    """The configuration of a tiny GPT-2, whose head is tied; `attn.c_proj` is its only square matrix."""
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_inner=inner,
        n_layer=layers,
        n_head=HEADS,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )


def make_model(*, kind="llama", dtype=torch.bfloat16, seed=0, **config):
    """A tiny Llama or GPT-2 in memory, weights of size 0.2, norms and biases around one.

    `config` is that of `llama_config` or `gpt2_config`.
    """
    model = GPT2LMHeadModel(gpt2_config(**config)) if kind == "gpt2" else LlamaForCausalLM(llama_config(**config))
    model = model.eval()
    named = list(model.named_parameters())
    fill_at_random([pair for pair in named if pair[1].ndim > 1], seed=seed, size=0.2)
    fill_at_random([pair for pair in named if pair[1].ndim == 1], seed=seed, size=0.1, mean=1.0)
    return model.to(dtype)


def make_base(folder, *, max_shard_size="1GB", **model):
    """Writes a tiny model as a checkpoint folder and returns it; `model` as for `make_model`."""
    make_model(**model).save_pretrained(folder, max_shard_size=max_shard_size)
    return Path(folder)


def load_base(folder, *, dtype="auto"):
    """The model in a folder as transformers loads it: a copy, which takes a fifth of the time of loading it again."""
    files = ((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in Path(folder).iterdir())
    return copy.deepcopy(loaded(folder, dtype, tuple(sorted(files))))


@lru_cache(maxsize=16)
def loaded(folder, dtype, files):
    """The model in a folder; `files` tells what is in it at the moment."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def make_evolved(base, folder, *, seed=100, drift=0.02, max_shard_size="1GB"):
    """Writes a later version of `base`: every tensor moved by seeded noise of size `drift`, rounded to its dtype."""
    model = load_base(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
            moved = parameter.float() + torch.randn(parameter.shape, generator=generator) * drift
            parameter.copy_(moved.to(parameter.dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return Path(folder)


def make_adapter(base, folder, *, seed=1, dtype=torch.float32, size=0.3, card=False, **lora):
    """Writes a LoRA adapter for `base` as PEFT does, with A and B seeded and neither of them zero.

    Args:
        base: Folder of the base checkpoint.
        folder: Where the adapter goes.
        seed: Of A, B and what else the adapter trains.
        dtype: In which the adapter is stored.
        size: Standard deviation of the values of A and B.
        card: Whether PEFT writes its own card, and not a short one stands in for it.
        **lora: Fields of peft's `LoraConfig`; without `target_modules`, all seven modules of every layer.
    """
    lora.setdefault("target_modules", list(SEVEN))
    lora.setdefault("r", 4)
    lora.setdefault("lora_alpha", 6)
    model = load_base(base)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    trained = [(name, parameter) for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    fill_at_random(trained, seed=seed, size=size)
    for _, parameter in trained:
        parameter.data = parameter.data.to(dtype)
    return save_adapter(tuned, folder, card=card)


def save_adapter(tuned, folder, *, card=False):
    """Writes an adapter as PEFT does, but for its card: it compiles a template anew for each, which takes longest."""
    if card:
        tuned.save_pretrained(folder)
    else:
        with mock.patch.object(PeftModel, "create_or_update_model_card"):
            tuned.save_pretrained(folder)
        Path(folder, "README.md").write_text(CARD)
    return Path(folder)


def load_tuned(base, adapter, *, dtype="auto"):
    """The base with the adapter on it, not merged, as PEFT loads it."""
    model = load_base(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).eval()


def merge_with_peft(base, adapter, folder, *, max_shard_size="1GB"):
    """Writes what PEFT's own merge makes of `base` and `adapter`: the reference for ours."""
    load_tuned(base, adapter).merge_and_unload().save_pretrained(folder, max_shard_size=max_shard_size)
    return Path(folder)


def logits(model, *, rows=2, tokens=7):
    """Logits on a fixed batch of token ids, in float32, shape (rows, tokens, vocabulary)."""
    ids = torch.arange(rows * tokens).reshape(rows, tokens) % VOCABULARY
    with torch.no_grad():
        return model(ids).logits.float()


def resized(base, n_rows, *, seed=7):
    """A tiny model in memory with another number of rows, the new ones seeded."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    torch.manual_seed(seed)
    model.resize_token_embeddings(n_rows)
    return model


def adapter_of(model, folder, *, seed=1, size=0.3, **lora):
    """Writes a LoRA adapter for a model in memory as PEFT does; returns it and the model with it, not merged."""
    lora = {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **lora}
    tuned = get_peft_model(model, LoraConfig(**lora)).eval()
    fill_at_random([pair for pair in tuned.named_parameters() if pair[1].requires_grad], seed=seed, size=size)
    return save_adapter(tuned, folder), tuned
