"""The names of PEFT's keys: what a tensor of an adapter file is, and what it is called. They live here alone. Pure.

Source: files written by PEFT 0.21 (https://github.com/huggingface/peft), in which the adapter's own name never stands
in a key. Where training programs store a running model's tensors themselves, it does, and so do names of wrappers;
PEFT then drops tensors without a word, and what is meant is still certain: `plain_key` takes those names out.
"""

import re
from collections.abc import Iterable, Mapping
from enum import Enum

PREFIX = "base_model.model."
INNER = ".base_layer"
"""Stands behind a module's name once for each parameter that is adapted after the one whose factors these are."""


class Role(Enum):
    """What a tensor of an adapter is to its module, by the end of its key."""

    A = ".lora_A.weight"
    B = ".lora_B.weight"
    EMBEDDING_A = ".lora_embedding_A"
    EMBEDDING_B = ".lora_embedding_B"
    MAGNITUDE = ".lora_magnitude_vector"
    BIAS_DELTA = ".lora_B.bias"
    BASE_WEIGHT = ".base_layer.weight"
    BASE_BIAS = ".base_layer.bias"
    TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
    WHOLE = ""


UNSUPPORTED: Mapping[str, str] = {
    "lora_diag": "a KaSA diagonal",
    PREFIX * 2: "of an adapter around another adapter",
    ".lora_down.": "a factor with kohya's names",
    ".lora_up.": "a factor with kohya's names",
}
"""Parts of keys that mean something that is refused, and its name."""

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Names that PyTorch's `compile`, FSDP and activation checkpointing put between those of the modules."""

_NAMED = re.compile(
    r"\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector|trainable_tokens_delta)"
    r"\.(?!(?:weight|bias)$)([^.]+)(?=(?:\.weight|\.bias)?$)"
)
_SAVED = ".modules_to_save."
_ORIGINAL, _UNDER_ROWS = ".original_module.", ".token_adapter.base_layer."
"""Where PEFT keeps the base's own value of what was trained beside it: a module saved whole, rows of an embedding."""
_MAGNITUDE = re.compile(r"(?<=\.lora_magnitude_vector)\.weight$")


def adapter_names(keys: Iterable[str]) -> tuple[str, ...]:
    """The names of adapters that stand in keys, sorted.

    Example:
        >>> adapter_names(["base_model.model.h.0.q.lora_A.sql.weight", "base_model.model.h.0.q.lora_B.weight"])
        ('sql',)
    """
    return tuple(sorted({match[2] for key in keys if (match := _NAMED.search(key))}))


def plain_key(key: str, name: str = "default") -> str:
    """A key as PEFT writes it: without the adapter's name, names of wrappers, and what stands for a running model.

    Args:
        key: As it stands in a file.
        name: The adapter's name, to tell it from a module's inside a module that is saved whole.

    Example:
        >>> plain_key("base_model.model._orig_mod.h.0.q.lora_A.sql.weight")
        'base_model.model.h.0.q.lora_A.weight'
        >>> plain_key("base_model.model.lm_head.modules_to_save.sql.weight", "sql")
        'base_model.model.lm_head.weight'
    """
    key = _NAMED.sub(r".\1", WRAPPERS.sub("", key))
    return _MAGNITUDE.sub("", key.replace(f"{_SAVED}{name}.", ".").replace(_SAVED, "."))


def copied_tensor(key: str) -> str | None:
    """The tensor of the model that a plain key holds the base's own value of; None for a key that holds something else.

    Example:
        >>> copied_tensor("base_model.model.lm_head.original_module.weight")
        'lm_head.weight'
        >>> copied_tensor("base_model.model.wte.token_adapter.base_layer.weight")
        'wte.weight'
        >>> copied_tensor("base_model.model.lm_head.weight") is None
        True
    """
    part = next((part for part in (_ORIGINAL, _UNDER_ROWS) if part in key), None)
    return None if part is None or not key.startswith(PREFIX) else key.removeprefix(PREFIX).replace(part, ".", 1)


def is_saved(key: str) -> bool:
    """Whether a key, as it stands in a file, says that the module is one that is saved whole."""
    return _SAVED in key


def is_original(key: str) -> bool:
    """Whether a key says that it holds the base's own value of a module that is saved whole."""
    return _ORIGINAL in key


def parse_key(key: str) -> tuple[str, Role] | None:
    """The module that a key belongs to and the tensor's role; for `WHOLE`, the tensor's name in the model.

    None for a key that PEFT would not load.

    Example:
        >>> parse_key("base_model.model.h.0.q.lora_A.weight")
        ('h.0.q', <Role.A: '.lora_A.weight'>)
        >>> parse_key("base_model.model.norm.weight")
        ('norm.weight', <Role.WHOLE: ''>)
    """
    if why_foreign(key) is not None:
        return None
    name = key.removeprefix(PREFIX)
    role = next(role for role in Role if name.endswith(role.value))
    module = name.removesuffix(role.value)
    return (module, role) if module else None


def why_foreign(key: str) -> str | None:
    """What a key that PEFT would not load is; None for one that it would.

    Example:
        >>> why_foreign("h.0.q.lora_A.weight")
        "without the prefix 'base_model.model.', so PEFT would silently ignore it"
    """
    kind = next((kind for part, kind in UNSUPPORTED.items() if part in key), None)
    if kind is not None:
        return f"{kind}, which is not supported"
    return None if key.startswith(PREFIX) else f"without the prefix '{PREFIX}', so PEFT would silently ignore it"


def split_inner(module: str) -> tuple[str, int]:
    """A module without `INNER`, and how often it stood there.

    Example:
        >>> split_inner("h.0.experts.base_layer")
        ('h.0.experts', 1)
    """
    depth = 0
    while module.endswith(INNER):
        module, depth = module.removesuffix(INNER), depth + 1
    return module, depth


def render_key(module: str, role: Role) -> str:
    """The key of a tensor; the inverse of `parse_key`."""
    return f"{PREFIX}{module}{role.value}"
