"""The names of PEFT's keys: what a tensor of an adapter file is, and what it is called. They live here alone. Pure.

Source: files written by PEFT 0.21 (https://github.com/huggingface/peft); the adapter's own name never stands in a key.
"""

from collections.abc import Mapping
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
}
"""Parts of keys that mean something that is refused, and its name."""


def parse_key(key: str) -> tuple[str, Role] | None:
    """The module that a key belongs to and the tensor's role; for `WHOLE`, the tensor's name in the model.

    None for a key that PEFT would not load.

    Example:
        >>> parse_key("base_model.model.h.0.q.lora_A.weight")
        ('h.0.q', <Role.A: '.lora_A.weight'>)
        >>> parse_key("base_model.model.norm.weight")
        ('norm.weight', <Role.WHOLE: ''>)
    """
    if not key.startswith(PREFIX) or any(part in key for part in UNSUPPORTED):
        return None
    name = key.removeprefix(PREFIX)
    role = next(role for role in Role if name.endswith(role.value))
    module = name.removesuffix(role.value)
    return (module, role) if module else None


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
