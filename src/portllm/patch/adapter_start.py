"""How an adapter's factors began, by its `init_lora_weights`: beside the base's weights, or with a part of them. Pure.

Source: `LoraLayer.update_layer` of PEFT 0.21 (https://github.com/huggingface/peft).
"""

import math
import re
from collections.abc import Mapping
from typing import Any, cast

BASE_PRESERVING_INITS = ("gaussian", "orthogonal", "eva", "mica")
"""Values of `init_lora_weights` that leave the base as it was, as true and false do."""

BASE_CHANGING_INITS = re.compile("pissa|pissa_niter_[0-9]+|olora|corda.*|lora_ga|loftq")
"""Those that take a part out of the base's weights before training; the adapter then belongs to what is left."""

RECOMPUTED_INITS = ("pissa", "olora")
"""Those of them whose part follows from the weights alone."""

INIT_CONFIGS: Mapping[str, str] = {"corda_config": "corda", "lora_ga_config": "lora_ga", "loftq_config": "loftq"}
"""The settings of some of them, which stay when PEFT's recipe for converting them overwrites `init_lora_weights`."""


def named_init(fields: Mapping[str, object]) -> str:
    """What an adapter's fields call its beginning, in lower case; `true` where they say nothing.

    Example:
        >>> named_init({"init_lora_weights": "OLoRA"}), named_init({})
        ('olora', 'true')
    """
    return str(fields.get("init_lora_weights", True)).lower()


def changed_base(fields: Mapping[str, object]) -> str | None:
    """How PEFT changed the base before training; None where it left it as it was.

    Example:
        >>> changed_base({"init_lora_weights": "pissa"}), changed_base({"init_lora_weights": "gaussian"})
        ('pissa', None)
        >>> changed_base({"init_lora_weights": True, "corda_config": {"corda_method": "kpm"}})
        'corda'
    """
    named = named_init(fields)
    if BASE_CHANGING_INITS.fullmatch(named):
        return named
    return next((init for name, init in INIT_CONFIGS.items() if fields.get(name)), None)


def is_known_init(value: object) -> bool:
    """Whether it is known what a value of `init_lora_weights` does to the base.

    Example:
        >>> [is_known_init(value) for value in (True, "pissa_niter_4", "pissa_niter_x")]
        [True, True, False]
    """
    if not isinstance(value, str):
        return value is None or isinstance(value, bool)
    return value.lower() in BASE_PRESERVING_INITS or BASE_CHANGING_INITS.fullmatch(value.lower()) is not None


def converted_fields(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields of an adapter after every module has got twice its rank, at the same scale, and its start is plain.

    Example:
        >>> converted_fields({"r": 4, "lora_alpha": 6, "rank_pattern": {"q": 3}, "init_lora_weights": "olora"})
        {'r': 8, 'lora_alpha': 12, 'rank_pattern': {'q': 6}, 'init_lora_weights': True, 'alpha_pattern': {}}
    """
    times = math.sqrt(2) if fields.get("use_rslora") else 2
    ranks, alphas = (cast(dict[str, Any], fields.get(name) or {}) for name in ("rank_pattern", "alpha_pattern"))
    return {
        **{name: value for name, value in fields.items() if name not in INIT_CONFIGS},
        "r": 2 * cast(int, fields["r"]),
        "lora_alpha": times * cast(float, fields.get("lora_alpha", 8)),
        "rank_pattern": {name: 2 * rank for name, rank in ranks.items()},
        "alpha_pattern": {name: times * alpha for name, alpha in alphas.items()},
        "init_lora_weights": True,
    }
