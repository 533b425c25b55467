"""The tokenizer inside a GGUF file, as the two files that transformers reads.

A GGUF file stores a vocabulary, its merges and the *name* of the rule that splits text before the merges apply
(`tokenizer.ggml.pre`). `PRE_TOKENIZERS` says what such a name means; supporting another one is one more row. Nothing is
guessed: an unknown name is refused, since a tokenizer that splits text differently gives a model other inputs
than it was trained on, and nobody would notice.
"""

from collections.abc import Mapping

from portllm.checkpoint.gguf.file import GGUFFile, listed

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

PRE_TOKENIZERS: Mapping[str, Mapping[str, object]] = {
    # Every digit alone, then GPT-2's rule: what llama.cpp does for LLAMA_VOCAB_PRE_TYPE_SMOLLM.
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    },
}
"""How text is split before merges apply: `tokenizer.ggml.pre` to the `pre_tokenizer` of a `tokenizer.json`."""

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""The kinds of token (`tokenizer.ggml.token_type`) that a byte-level vocabulary can have."""

_NAMED_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}

_CHAT_TEMPLATE = "tokenizer.chat_template"


def read_tokens(file: GGUFFile) -> list[str]:
    """The vocabulary, in the order of the ids.

    Raises:
        CheckpointError: It is missing, or has a token twice.
    """
    tokens = file.texts("tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        raise file.refuse("its vocabulary contains a token twice; tokens must be unique.")
    return tokens


def named_ids(file: GGUFFile, *, n_tokens: int) -> dict[str, int]:
    """The ids of `bos_token`, `eos_token`, `unk_token` and `pad_token`, those that the file names.

    Raises:
        CheckpointError: An id is outside the vocabulary.
    """
    ids: dict[str, int] = {}
    for name, key in _NAMED_TOKENS.items():
        if file.has(key):
            ids[name] = file.integer(key)
            if ids[name] >= n_tokens:
                raise file.refuse(f"its metadata '{key}' is {ids[name]}; the vocabulary has {n_tokens} tokens.")
    return ids


def tokenizer_json(file: GGUFFile, tokens: list[str]) -> dict[str, object]:
    """The value of `tokenizer.json`: byte-level BPE with the file's vocabulary, merges and special tokens.

    Args:
        file: Where merges, kinds of token and the pre-tokenizer's name are read.
        tokens: What `read_tokens` gave for it.

    Raises:
        CheckpointError: The tokenizer is of a kind that is not supported, or contradicts itself.
    """
    model = file.text("tokenizer.ggml.model")
    if model != "gpt2":
        raise file.refuse(f"its tokenizer model is '{model}'; only 'gpt2' (byte-level BPE) is supported.")
    pre = file.text("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise file.refuse(f"its pre-tokenizer is '{pre}'; supported: {listed(PRE_TOKENIZERS)}.")
    for key in ("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix"):
        if file.has(f"tokenizer.ggml.{key}") and file.flag(f"tokenizer.ggml.{key}"):
            raise file.refuse(
                f"its metadata 'tokenizer.ggml.{key}' is true; only tokenizers that add no tokens are supported."
            )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(file, tokens),
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": _merges(file, tokens),
        },
    }


def tokenizer_config_json(file: GGUFFile, tokens: list[str], *, context: int) -> dict[str, object]:
    """The value of `tokenizer_config.json`: the named tokens, the chat template if there is one, and the length.

    The class is the generic one on purpose: GPT2Tokenizer would put its own pre-tokenizer in place of the file's.
    """
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    config |= {name: tokens[number] for name, number in named_ids(file, n_tokens=len(tokens)).items()}
    if file.has(_CHAT_TEMPLATE):
        config["chat_template"] = file.text(_CHAT_TEMPLATE)
    return config


def _added_tokens(file: GGUFFile, tokens: list[str]) -> list[dict[str, object]]:
    kinds = file.integers("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise file.refuse(
            f"its metadata 'tokenizer.ggml.token_type' has {len(kinds)} entries for {len(tokens)} tokens."
        )
    odd = [token for token, kind in zip(tokens, kinds, strict=True) if kind not in (_NORMAL, _CONTROL, _USER_DEFINED)]
    if odd:
        raise file.refuse(
            f"its vocabulary has tokens that are neither normal nor control nor user-defined: {listed(odd)}. "
            "A byte-level vocabulary has no other kinds."
        )
    return [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != _NORMAL
    ]


def _merges(file: GGUFFile, tokens: list[str]) -> list[list[str]]:
    known = set(tokens)
    merges = [merge.split(" ") for merge in file.texts("tokenizer.ggml.merges")]
    for merge in merges:
        if len(merge) != 2 or not known.issuperset((*merge, "".join(merge))):
            raise file.refuse(
                f"its merge '{' '.join(merge)[:80]}' does not join two tokens of the vocabulary into a third. The "
                "file is corrupt."
            )
    return merges
