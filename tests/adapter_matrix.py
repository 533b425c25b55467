"""The kinds of adapter that are supported: read by the tests, which try each of them, and by the page that lists them.

`docs/adapters.md` is written from these rows by `scripts/gen_docs.py`, so that it cannot claim more than is tested.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

QV = ["q_proj", "v_proj"]
BYTES = "PEFT's bytes"
ONCE = "float32, rounded once"
LOGITS = "PEFT's logits before merging"

ORACLES = {
    BYTES: "the merged bytes equal those of PEFT's `merge_and_unload`, in every dtype",
    ONCE: "the same in float32; in 16 bits PEFT rounds twice, here the float32 sum is rounded once",
    LOGITS: "head and embedding are tied and the adapter sets them apart: PEFT's merge gives another model than its "
    "adapter does, here the output is untied and has the logits of the adapter",
}


@dataclass(frozen=True)
class Row:
    """One kind of adapter.

    Attributes:
        says: What `adapter_config.json` says, for the page.
        lora: Fields of peft's `LoraConfig`.
        merge: What the merged model is compared with.
        port: How it is carried to an evolved base.
        model: `llama` or `gpt2`.
        base: How the tiny base is made; see `tests.models.make_base`.
        untied: Whether the merge of a tied base has a head of its own.
    """

    says: str
    lora: Mapping[str, object]
    merge: str = BYTES
    port: str = "as it is"
    model: str = "llama"
    base: Mapping[str, object] = field(default_factory=dict)
    untied: bool = False


VALUES = "values are re-based: W1 + (V - W0)"
ROWS = "rows are re-based: W1 + (V - W0)"
MAGNITUDES = "magnitudes are re-based: m |W1 + Δ| / |W0 + Δ|"
UNTIED, TIED, BIASED = {"tied": False}, {"tied": True}, {"attention_bias": True, "tied": False}

MATRIX: Mapping[str, Row] = {
    "plain": Row("a list of `target_modules`", {"target_modules": QV}),
    "rank-stabilized": Row("`use_rslora`", {"target_modules": QV, "use_rslora": True}),
    "patterns": Row(
        "`rank_pattern`, `alpha_pattern`",
        {"target_modules": QV, "rank_pattern": {r"layers\.1\..*": 3}, "alpha_pattern": {"v_proj": 11}},
    ),
    "expression": Row("`target_modules` as an expression", {"target_modules": r"model\.layers\..*\.(q|up)_proj"}),
    "all-linear": Row('`target_modules: "all-linear"`', {"target_modules": "all-linear"}),
    "some layers": Row(
        "`layers_to_transform`, `layers_pattern`",
        {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "excluded": Row("`exclude_modules`", {"target_modules": QV, "exclude_modules": r".*layers\.0\.self_attn\.v_proj"}),
    "head": Row("a head of its own among `target_modules`", {"target_modules": [*QV, "lm_head"]}, base=UNTIED),
    "tied head": Row(
        "a tied head among `target_modules`", {"target_modules": [*QV, "lm_head"]}, LOGITS, base=TIED, untied=True
    ),
    "embedding": Row(
        "an embedding among `target_modules`", {"target_modules": [*QV, "embed_tokens"]}, ONCE, base=UNTIED
    ),
    "tied embedding": Row(
        "a tied embedding among `target_modules`",
        {"target_modules": [*QV, "embed_tokens"]},
        LOGITS,
        base=TIED,
        untied=True,
    ),
    "embedding and head, kept tied": Row(
        "the same with `ensure_weight_tying`",
        {"target_modules": [*QV, "embed_tokens"], "ensure_weight_tying": True},
        LOGITS,
        base=TIED,
        untied=True,
    ),
    "conv1d": Row(
        "`fan_in_fan_out`: GPT-2's Conv1D", {"target_modules": ["c_attn", "c_proj", "c_fc"]}, model="gpt2"
    ),
    "conv1d and biases": Row(
        "the same with `bias: all`",
        {"target_modules": ["c_attn", "c_proj"], "bias": "all"},
        port=VALUES,
        model="gpt2",
    ),
    "conv1d and head": Row(
        "Conv1D and a tied head together",
        {"target_modules": ["c_attn", "c_proj", "lm_head"]},
        LOGITS,
        model="gpt2",
        untied=True,
    ),
    "embedding of gpt2": Row(
        "GPT-2's tied embedding among `target_modules`",
        {"target_modules": ["c_attn", "wte"]},
        LOGITS,
        model="gpt2",
        untied=True,
    ),
    "saved embedding of gpt2": Row(
        "GPT-2's tied embedding in `modules_to_save`",
        {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
        port=VALUES,
        model="gpt2",
        untied=True,
    ),
    "token rows of gpt2": Row(
        "GPT-2's token rows",
        {"target_modules": ["c_attn"], "trainable_token_indices": [7, 3]},
        port=ROWS,
        model="gpt2",
    ),
    "saved norms": Row(
        "`modules_to_save`: norms", {"target_modules": QV, "modules_to_save": ["norm"]}, port=VALUES, base=UNTIED
    ),
    "saved block": Row(
        "`modules_to_save`: a part of each layer", {"target_modules": QV, "modules_to_save": ["mlp"]}, port=VALUES
    ),
    "saved head": Row(
        "`modules_to_save`: head and embedding",
        {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"]},
        port=VALUES,
        base=UNTIED,
    ),
    "saved tied head": Row(
        "`modules_to_save`: a tied head",
        {"target_modules": QV, "modules_to_save": ["lm_head"]},
        port=VALUES,
        base=TIED,
        untied=True,
    ),
    "saved tied embedding": Row(
        "`modules_to_save`: a tied embedding",
        {"target_modules": QV, "modules_to_save": ["embed_tokens"]},
        port=VALUES,
        base=TIED,
        untied=True,
    ),
    "saved embedding and head, kept tied": Row(
        "the same with `ensure_weight_tying`",
        {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        port=VALUES,
        base=TIED,
    ),
    "token rows": Row(
        "`trainable_token_indices`, a list",
        {"target_modules": QV, "trainable_token_indices": [7, 3]},
        port=ROWS,
        base=UNTIED,
    ),
    "token rows of both": Row(
        "`trainable_token_indices` by module",
        {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [5]}},
        port=ROWS,
        base=UNTIED,
    ),
    "tied token rows": Row(
        "`trainable_token_indices` of a tied embedding",
        {"target_modules": QV, "trainable_token_indices": [7, 3]},
        port=ROWS,
        base=TIED,
    ),
    "tied token rows of both": Row(
        "the same rows of a tied head and its embedding",
        {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [7, 3]}},
        port=ROWS,
        base=TIED,
    ),
    "tied token rows of each": Row(
        "other rows of a tied head than of its embedding",
        {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [5]}},
        LOGITS,
        port=ROWS,
        base=TIED,
        untied=True,
    ),
    "trained biases": Row("`bias: lora_only`", {"target_modules": QV, "bias": "lora_only"}, port=VALUES, base=BIASED),
    "all biases": Row("`bias: all`", {"target_modules": QV, "bias": "all"}, port=VALUES, base=BIASED),
    "bias of B": Row("`lora_bias`", {"target_modules": QV, "lora_bias": True}, base=BIASED),
    "dora": Row("`use_dora`", {"target_modules": QV, "use_dora": True}, port=MAGNITUDES),
    "dora, rank-stabilized": Row(
        "`use_dora` with `use_rslora`",
        {"target_modules": ["up_proj", "o_proj"], "use_dora": True, "use_rslora": True},
        port=MAGNITUDES,
    ),
    "dora of conv1d": Row(
        "`use_dora` with `fan_in_fan_out`",
        {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
        port=MAGNITUDES,
        model="gpt2",
    ),
}  # fmt: skip

REFUSED: Mapping[str, tuple[Mapping[str, object], str]] = {
    "another `peft_type`": ({"peft_type": "LOHA"}, "not a low-rank sum"),
    "PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ, KaSA": (
        {"init_lora_weights": "pissa"},
        "the base was changed when training began; save it with `path_initial_model_for_weight_conversion`, which is "
        "plain LoRA then",
    ),
    "`target_parameters`": (
        {"target_parameters": ["experts.w1"]},
        "its keys do not say which parameter they belong to",
    ),
    "`layer_replication`": ({"layer_replication": [[0, 2], [1, 2]]}, "layers that the base does not have"),
    "`alora_invocation_tokens`": ({"alora_invocation_tokens": [1]}, "acts on a part of the text, so it is no weight"),
    "`arrow_config`": ({"arrow_config": {"top_k": 3}}, "routes between adapters"),
    "`use_qalora`": ({"use_qalora": True}, "acts on pooled inputs"),
    "`use_bdlora`": ({"use_bdlora": {"nblocks": 2}}, "its factors are blocks"),
    "`kasa_config`": ({"kasa_config": {"beta": 1}}, "has a diagonal between its factors"),
    "`velora_config`": ({"velora_config": {"a": 1}}, "not known to leave the result alone"),
    "`monteclora_config`": ({"monteclora_config": {"a": 1}}, "samples its factors"),
    "`megatron_config`": ({"megatron_config": {"a": 1}}, "modules of another library"),
    "a field that is not known": ({"newest_field": 1}, "may change the result"),
}
