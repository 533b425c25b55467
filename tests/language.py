"""Tiny tokenizers and a tiny model that reads with them, all from a seed and a page of text."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.models import fill_at_random, llama_config

TEXT = """
Which kind of question is it? The clinic asks what causes a fever, how a fever is treated, and who is at risk.
What are the symptoms of measles? What are the treatments for measles? What causes measles? Is measles inherited?
Question: what helps against a cold? Answer: rest, tea and time. Kind: treatment. Kind: cause. Kind: symptoms.
"""

SPECIAL = ["<pad>", "<bos>", "<eos>"]


def byte_level_tokenizer():
    """Byte-level BPE as in SmolLM2: a space belongs to the word after it, nothing is put before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def metaspace_tokenizer(*, ends_texts=False):
    """BPE as in Llama 2 and Mistral: a space before every text, and a begin-of-text mark; an end mark if asked for."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=150, special_tokens=[*SPECIAL, "<unk>"], show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if ends_texts else "<bos> $A", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template of SmolLM2 and of the first Qwens."""


def chatting(tokenizer, template=CHATML):
    """The tokenizer with a chat template and its marks."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def make_reader(folder, *, seed=0, dtype=torch.bfloat16, tied=True, template=None):
    """Writes a tiny Llama with the byte-level tokenizer as a checkpoint folder and returns it."""
    tokenizer = byte_level_tokenizer() if template is None else chatting(byte_level_tokenizer(), template)
    config = llama_config(tied=tied)
    config.vocab_size = len(tokenizer)
    model = LlamaForCausalLM(config)
    named = list(model.named_parameters())
    fill_at_random([pair for pair in named if pair[1].ndim > 1], seed=seed, size=0.2)
    fill_at_random([pair for pair in named if pair[1].ndim == 1], seed=seed, size=0.1, mean=1.0)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
