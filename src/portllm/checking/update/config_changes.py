"""What an update changed in `config.json` that matters to a patch. Pure: two mappings in, a list of changes out.

Fields have had several names, and models of vision and text keep theirs in a part; what means the same is compared as
the same. What is not named here (dates, dtypes, defaults of generation) does not touch the weights' meaning.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Effect(StrEnum):
    """What a change does to a patch."""

    SHAPE = "shape"
    """Weights get another shape; the fit of each tensor says which."""

    FUNCTION = "function"
    """The same weights compute something else."""

    POSITION = "position"
    """Attention sees positions otherwise; what a patch learned at short distances may stay as it was."""

    VOCABULARY = "vocabulary"
    """Rows of the embedding and the head are other ones."""


FIELDS: Mapping[str, tuple[Effect, tuple[str, ...]]] = {
    "architecture": (Effect.FUNCTION, ("model_type",)),
    "layers": (Effect.SHAPE, ("num_hidden_layers", "n_layer")),
    "width": (Effect.SHAPE, ("hidden_size", "n_embd")),
    "inner width": (Effect.SHAPE, ("intermediate_size", "n_inner")),
    "attention heads": (Effect.FUNCTION, ("num_attention_heads", "n_head")),
    "key heads": (Effect.FUNCTION, ("num_key_value_heads",)),
    "head width": (Effect.FUNCTION, ("head_dim",)),
    "experts": (Effect.SHAPE, ("num_experts", "num_local_experts")),
    "experts of a token": (Effect.FUNCTION, ("num_experts_per_tok",)),
    "activation": (Effect.FUNCTION, ("hidden_act", "hidden_activation", "activation_function")),
    "norm epsilon": (Effect.FUNCTION, ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")),
    "sliding window": (Effect.FUNCTION, ("sliding_window",)),
    "kinds of layers": (Effect.FUNCTION, ("layer_types",)),
    "logit cap": (Effect.FUNCTION, ("final_logit_softcapping",)),
    "attention cap": (Effect.FUNCTION, ("attn_logit_softcapping",)),
    "rope theta": (Effect.POSITION, ("rope_theta",)),
    "rope scaling": (Effect.POSITION, ("rope_scaling",)),
    "rotary share": (Effect.POSITION, ("partial_rotary_factor",)),
    "context length": (Effect.POSITION, ("max_position_embeddings", "n_positions")),
    "vocabulary size": (Effect.VOCABULARY, ("vocab_size",)),
    "tied head": (Effect.VOCABULARY, ("tie_word_embeddings",)),
}
"""What is compared, what a change of it does, and the names that `config.json` has for it."""

NONE_WHERE_UNSAID = ("sliding window", "logit cap", "attention cap", "rope scaling")
"""Fields that a model has none of where it does not say so; of others, what is not said is some version's default."""

ROPE_FIELDS = ("rope_theta", "partial_rotary_factor")
ROPE_KIND = ("rope_type", "type")


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """One change.

    Attributes:
        field: What changed, in the words of `FIELDS`.
        base: The value in the base; None where it is not said.
        evolved: The value in the evolved model.
        effect: What the change does.
    """

    field: str
    base: object
    evolved: object
    effect: Effect


def compare_configs(base: Mapping[str, object], evolved: Mapping[str, object]) -> tuple[ConfigChange, ...]:
    """Every change that matters, in the order of `FIELDS`; none where a model has no configuration.

    Example:
        >>> base = {"hidden_act": "silu", "rope_theta": 1e4, "torch_dtype": "bfloat16"}
        >>> evolved = {"hidden_act": "silu", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
        >>> [(change.field, change.base, change.evolved) for change in compare_configs(base, evolved)]
        [('rope theta', 10000.0, 500000.0)]
    """
    if not base or not evolved:
        return ()
    before, after = _flat(base), _flat(evolved)
    changes = []
    for field, (effect, names) in FIELDS.items():
        old, new = (next((values[name] for name in names if name in values), None) for values in (before, after))
        is_said = None not in (old, new) or field in NONE_WHERE_UNSAID
        if old != new and is_said:
            changes.append(ConfigChange(field, old, new, effect))
    return tuple(changes)


def _flat(config: Mapping[str, object]) -> dict[str, object]:
    """The fields of a configuration: its part about text comes before its own, and those about rope stand alone."""
    inner = config.get("text_config")
    values = {**config, **(inner if isinstance(inner, dict) else {})}
    # transformers 5 has `rope_parameters`; before, theta stood alone and `rope_scaling` was there for anything unusual.
    rope = values.pop("rope_parameters", None) or values.pop("rope_scaling", None)
    values.pop("rope_scaling", None)
    if isinstance(rope, dict):
        values |= {name: rope[name] for name in ROPE_FIELDS if name in rope}
        kind = next((rope[name] for name in ROPE_KIND if name in rope), "default")
        if kind != "default":
            rest = {name: value for name, value in rope.items() if name not in (*ROPE_FIELDS, *ROPE_KIND)}
            values["rope_scaling"] = {"rope_type": kind, **dict(sorted(rest.items()))}
    return {name: value for name, value in values.items() if value is not None}
