"""Tiny seeded models of each layout that the package reads, made by transformers from its own configurations.

Width 12, inner width 20, three query heads and one key head of 6, vocabulary 31, two layers: no matrix is square
but for those that an architecture makes square (GPT-2's attention output, Qwen 2-VL's query, projections of a vision
tower).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from tests.models import fill_at_random, save_adapter

TEXT = {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SEVEN = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
GEMMA3_VISION = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 14}


@dataclass(frozen=True)
class Kind:
    """One tiny model.

    Attributes:
        family: Its model type, which is what the package calls its family.
        config: Name of its configuration's class.
        model: Name of its own class.
        fields: Of its configuration.
        targets: Modules to put LoRA on.
        text: Fields of the part of its configuration about text, for a model of vision and text.
    """

    family: str
    config: str
    model: str
    fields: dict = field(default_factory=dict)
    targets: tuple[str, ...] = SEVEN
    text: dict = field(default_factory=dict)


KINDS = {
    "llama": Kind("llama", "LlamaConfig", "LlamaForCausalLM", TEXT),
    "mistral": Kind("mistral", "MistralConfig", "MistralForCausalLM", TEXT),
    "gemma2": Kind("gemma2", "Gemma2Config", "Gemma2ForCausalLM", TEXT),
    "gemma3": Kind("gemma3_text", "Gemma3TextConfig", "Gemma3ForCausalLM", TEXT),
    "qwen2": Kind("qwen2", "Qwen2Config", "Qwen2ForCausalLM", TEXT),
    "qwen3": Kind("qwen3", "Qwen3Config", "Qwen3ForCausalLM", TEXT),
    "phi3": Kind(
        "phi3", "Phi3Config", "Phi3ForCausalLM", TEXT, targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    ),
    "gpt2": Kind(
        "gpt2",
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 31, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": 20, "n_positions": 64},
        targets=("c_attn", "c_proj", "c_fc"),
    ),
    "mixtral": Kind(
        "mixtral",
        "MixtralConfig",
        "MixtralForCausalLM",
        {**TEXT, "num_local_experts": 3, "num_experts_per_tok": 2},
        targets=ATTENTION,
    ),
    "qwen2-moe": Kind(
        "qwen2_moe",
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            **TEXT,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 14,
        },
        targets=(*ATTENTION, "shared_expert_gate"),
    ),
    "qwen3-moe": Kind(
        "qwen3_moe",
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**TEXT, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        targets=ATTENTION,
    ),
    "gemma3-vision": Kind(
        "gemma3",
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "vision_config": {**GEMMA3_VISION, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
            "image_token_index": 30,
            "boi_token_index": 28,
            "eoi_token_index": 29,
        },
        targets=(*SEVEN, "fc1"),
        text=TEXT,
    ),
    "qwen2-vision": Kind(
        "qwen2_vl",
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        {"vision_config": {**QWEN_VISION, "embed_dim": 8, "hidden_size": 12}},
        targets=(*SEVEN, "qkv"),
        text={
            **TEXT,
            "num_attention_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1e4},
        },
    ),
}


def make_config(kind, *, tied):
    """The configuration of a tiny model of a kind."""
    made = KINDS[kind]
    fields = {**made.fields, "tie_word_embeddings": tied}
    if made.text:
        fields["text_config"] = {**made.text, "tie_word_embeddings": tied}
    return getattr(transformers, made.config)(**fields)


def make_model(kind, *, tied=True, dtype=torch.bfloat16, seed=0):
    """A tiny model in memory, matrices of size 0.2, vectors around one."""
    model = getattr(transformers, KINDS[kind].model)(make_config(kind, tied=tied)).eval()
    named = list(model.named_parameters())
    fill_at_random([pair for pair in named if pair[1].ndim > 1], seed=seed, size=0.2)
    fill_at_random([pair for pair in named if pair[1].ndim == 1], seed=seed, size=0.1, mean=1.0)
    return model.to(dtype)


def load(kind, folder, *, dtype="auto"):
    """The model in a folder, by the class of its kind."""
    return getattr(transformers, KINDS[kind].model).from_pretrained(folder, dtype=dtype).eval()


def make_base(kind, folder, *, current=False, **model):
    """Writes a tiny model: in the spelling that transformers writes by itself, or with current names."""
    make_model(kind, **model).save_pretrained(folder, save_original_format=not current)
    return Path(folder)


def make_adapter(kind, base, folder, *, seed=1, size=0.3, **lora):
    """Writes an adapter of a tiny model as PEFT does, with A and B seeded and neither of them zero."""
    fields = {"target_modules": list(KINDS[kind].targets), "r": 4, "lora_alpha": 6, **lora}
    tuned = get_peft_model(load(kind, base), LoraConfig(**fields))
    fill_at_random([pair for pair in tuned.named_parameters() if pair[1].requires_grad], seed=seed, size=size)
    return save_adapter(tuned, folder)


def load_tuned(kind, base, adapter, *, dtype="auto"):
    """The base with the adapter on it, not merged, as PEFT loads it."""
    return PeftModel.from_pretrained(load(kind, base, dtype=dtype), adapter).eval()


def merge_with_peft(kind, base, adapter, folder, *, current=False):
    """Writes what PEFT's own merge makes of `base` and `adapter`."""
    merged = load_tuned(kind, base, adapter).merge_and_unload()
    merged.save_pretrained(folder, save_original_format=not current)
    return Path(folder)


OLD = {
    "gemma3-vision": [("lm_head.", "language_model.lm_head."), ("model.language_model.", "language_model.model."),
                      ("model.vision_tower.", "vision_tower.vision_model.")],
    "qwen2-vision": [("model.language_model.", "model."), ("model.visual.", "visual.")],
    "mixtral": [("model.layers.0.mlp.", "model.layers.0.block_sparse_moe.")],
}  # fmt: skip
"""How transformers 4 began the names of models that transformers 5 names otherwise."""


def spelled_of_old(kind, name):
    """A current name as transformers 4 had it."""
    for new, old in OLD[kind]:
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name
