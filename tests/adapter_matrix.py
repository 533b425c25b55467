"""The kinds of adapter that are supported: read by the tests, which try each of them, and by the page that lists them.

`docs/adapters.md` is written from these rows by `scripts/gen_docs.py`, so that it cannot claim more than is tested.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

QV = ["q_proj", "v_proj"]
BYTES = "PEFT's bytes"
ONCE = "float32, rounded once"
LOGITS = "PEFT's logits"

ORACLES = {
    BYTES: "bit for bit the result of PEFT's `merge_and_unload`, in bfloat16, float32 and for some rows in float16",
    ONCE: "the same in float32. In 16 bits PEFT rounds the delta and then the sum; PortLLM rounds the float32 sum once",
    LOGITS: "head and embedding are tied, and the adapter changes only one of them or both differently. PEFT's merge "
    "gives another model\n  than its adapter; PortLLM's output is untied and has the adapter's logits, to 2e-5 of the "
    "largest in float32",
}

INTRODUCTION = """\
Written by `scripts/gen_docs.py` from the table that the tests go through row by row; change the table, not this page.

This page lists the adapters of PEFT 0.21 (`adapter_config.json`, `adapter_model.safetensors`). Each row is tested:
merged, captured and loaded again by PEFT, and ported to an evolved base. In each row, a missing tensor, a tensor that
the configuration does not explain, and a field that contradicts the tensors are refused by name."""

NOTES = """\
On an Intel Xeon whose MKL, which multiplies for torch, was told to use AVX2 alone, a row of a product was rounded by
its place in the matrix: the last bits of float32 merges then differed from PEFT's, and with the size of blocks. With
`MKL_CBWR=COMPATIBLE` in the environment of both, they did not.

How they are ported: a delta that is added to a weight is carried over *as it is*. A value that replaces the base's
is *re-based*: what it changed is carried over. With V the value in the file and W0, W1 the base's and the evolved
model's, it becomes `V + (W1 - W0)` in float32, so a port without drift changes nothing. A DoRA weight `m (W + Δ) /
|W + Δ|` keeps the factor by which each row is scaled: the magnitude becomes `m |W1 + Δ| / |W0 + Δ|`; a row of zeros
has no such factor and is refused. Re-basing needs `--base`. If base and evolved model have different tokenizers,
rows of embeddings, heads and token lists follow their token's string, whatever kind of change they are.

`modules_to_save` matches the end of module names, as in PEFT: `norm` also saves every `input_layernorm`. A DoRA of
an embedding is refused, because PEFT's merge ignores its magnitude. Two more cases are refused: token rows of a
tied embedding together with another change of the head, and token rows for a model that ties head and embedding
differently from the base.

## Copies of the base

PEFT stores weights of the base beside the factors: under an adapter of the head (`X.base_layer.weight`), under
token rows (`X.token_adapter.base_layer.weight`), beside a saved module (`X.original_module.weight`), and embedding
and head whenever the vocabulary was resized (`X.weight`). They are compared with the base. What equals it, also
after rounding to bfloat16 or float16, is a copy and is left out with a note, because PEFT would overwrite the
evolved model's weights with it. An embedding or a head that differs was trained, and is kept as a saved module.
Anything else that differs is refused: the adapter belongs to another base.

## Added tokens

If an embedding has more rows than the base's, tokens were added for the adapter, and the tokenizer in its folder
says which. Their rows are the patch's own. `capture` keeps them as token rows, so that PEFT loads the patch on a
base resized to that many rows; `merge` writes the resized model with its `vocab_size` and tokenizer; `port` gives
each token the row of the same string in the evolved vocabulary, or the next one behind its last token, carries its
row as it is, and writes the tokenizer of the evolved model with these tokens. The same goes for added tokens of the
base that a patch trains and the evolved model lacks. Rows that stand for no token pad the vocabulary to a multiple,
and do so again. Without a tokenizer the patch is refused, unless the base is given as it was resized. PEFT does not
save the resized head of an adapter of the embedding alone; such an adapter needs the resized base too. A head with
a bias (Phi, GPT-J) is kept whole; beside trained rows or factors of it, PEFT has no place for the bias of new rows, and
such an adapter can only be merged.

## Heads of the patch

A classifier's or reward model's head is in no base. `capture` and `port` carry it as it is. `merge` writes the
model of its class, which transformers names for the adapter's `task_type` (`SEQ_CLS`, `TOKEN_CLS`, `QUESTION_ANS`),
with as many labels as the head has outputs; their names are those in a `config.json` beside the adapter, or in the
base's. A head of no such task stays an adapter, as does one whose class has tensors that neither adapter nor base
contains. A value head of reinforcement learning in a file of its own (`value_head.safetensors`) is kept with the patch
and copied beside the merged model's weights, where LLaMA-Factory finds it.

## Tokenizer and chat template

The files of a tokenizer and its chat template in an adapter's folder are kept with the patch. A merged model gets
them where they differ from the base's, with a note; `--tokenizer base` keeps the base's. If the adapter's tokenizer
gives a token another row than the base's does, or has more tokens than the model has rows, `merge` asks for one or
the other. `combine` keeps them, and the rows of added tokens, where the patches agree; a patch whose tokenizer,
template or trained row of a token differs from another's is refused by name."""


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

    @property
    def on(self) -> str:
        """What kind of model it is tried on, for the page."""
        if self.model == "gpt2":
            return "GPT-2, tied head"
        biases = ", biases" if self.base.get("attention_bias") else ""
        return f"Llama, {'own' if self.base.get('tied') is False else 'tied'} head{biases}"


VALUES = "values re-based"
ROWS = "rows re-based"
MAGNITUDES = "magnitudes re-based"
UNTIED, TIED, BIASED = {"tied": False}, {"tied": True}, {"attention_bias": True, "tied": False}

MATRIX: Mapping[str, Row] = {
    "plain": Row("a list of `target_modules`", {"target_modules": QV}),
    "rank-stabilized": Row("`use_rslora`", {"target_modules": QV, "use_rslora": True}),
    "patterns": Row(
        "`rank_pattern`, `alpha_pattern`",
        {"target_modules": QV, "rank_pattern": {r"layers\.1\..*": 3}, "alpha_pattern": {"v_proj": 11}},
    ),
    "expression": Row("`target_modules` as a regex", {"target_modules": r"model\.layers\..*\.(q|up)_proj"}),
    "all-linear": Row('`target_modules: "all-linear"`', {"target_modules": "all-linear"}),
    "some layers": Row(
        "`layers_to_transform`, `layers_pattern`",
        {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "excluded": Row("`exclude_modules`", {"target_modules": QV, "exclude_modules": r".*layers\.0\.self_attn\.v_proj"}),
    "head": Row("an untied head in `target_modules`", {"target_modules": [*QV, "lm_head"]}, base=UNTIED),
    "tied head": Row(
        "a tied head in `target_modules`", {"target_modules": [*QV, "lm_head"]}, LOGITS, base=TIED, untied=True
    ),
    "embedding": Row(
        "an embedding in `target_modules`", {"target_modules": [*QV, "embed_tokens"]}, ONCE, base=UNTIED
    ),
    "tied embedding": Row(
        "a tied embedding in `target_modules`",
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
        "GPT-2's tied embedding in `target_modules`",
        {"target_modules": ["c_attn", "wte"]},
        LOGITS,
        model="gpt2",
        untied=True,
    ),
    "positions of gpt2": Row(
        "GPT-2's embedding of positions in `target_modules`",
        {"target_modules": ["c_attn", "wpe"]},
        ONCE,
        model="gpt2",
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
    "dora of a tied head": Row(
        "`use_dora` with a tied head in `target_modules`",
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
        LOGITS,
        port=MAGNITUDES,
        base=TIED,
        untied=True,
    ),
    "dora of conv1d": Row(
        "`use_dora` with `fan_in_fan_out`",
        {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
        port=MAGNITUDES,
        model="gpt2",
    ),
}  # fmt: skip

PATTERNS = {"rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5}, "alpha_pattern": {"o_proj": 9}}
QVOU = [*QV, "o_proj", "up_proj"]


@dataclass(frozen=True)
class Start:
    """One way in which PEFT begins with a part of the base's weights.

    Attributes:
        says: What `adapter_config.json` says, for the page.
        lora: Fields of peft's `LoraConfig`.
        is_computed: Whether that part is computed anew where the initial adapter is not given.
    """

    says: str
    lora: Mapping[str, object]
    is_computed: bool = True


CONVERTED: Mapping[str, Start] = {
    "pissa": Start("`pissa`", {"init_lora_weights": "pissa"}),
    "pissa, rank-stabilized": Start("`pissa` with `use_rslora`", {"init_lora_weights": "pissa", "use_rslora": True}),
    "pissa, patterns": Start(
        "`pissa` with `rank_pattern`, `alpha_pattern`", {"init_lora_weights": "pissa", **PATTERNS}
    ),
    "pissa, both": Start("`pissa` with all three", {"init_lora_weights": "pissa", "use_rslora": True, **PATTERNS}),
    "pissa, dora": Start("`pissa` with `use_dora`", {"init_lora_weights": "pissa", "use_dora": True}),
    "pissa, saved norms": Start(
        "`pissa` with `modules_to_save`", {"init_lora_weights": "pissa", "modules_to_save": ["norm"]}
    ),
    "pissa, head": Start(
        "`pissa`, an untied head in `target_modules`",
        {"init_lora_weights": "pissa", "target_modules": [*QVOU, "lm_head"]},
    ),
    "olora": Start("`olora`", {"init_lora_weights": "olora"}),
    "olora, both": Start(
        "`olora` with `use_rslora` and patterns", {"init_lora_weights": "olora", "use_rslora": True, **PATTERNS}
    ),
    "pissa_niter_4": Start("`pissa_niter_4` and the like", {"init_lora_weights": "pissa_niter_4"}, is_computed=False),
    "corda": Start("`corda`", {"init_lora_weights": "corda"}, is_computed=False),
    "lora_ga": Start("`lora_ga`", {"init_lora_weights": "lora_ga", "r": 2}, is_computed=False),
    "loftq": Start("`loftq`", {"init_lora_weights": "loftq"}, is_computed=False),
}  # fmt: skip

CONVERSION = """\
With some values of `init_lora_weights`, PEFT subtracts a part `s B0 A0` from the base's weights W before training, and
the adapter belongs to the remainder. `portllm capture` converts such an adapter into a patch of the original base: the
learned change is `s B A - s B0 A0`, a delta of twice the rank, relative to W. Every other command refuses the adapter
and points to `capture`. The record says how it was converted.

- **With `--initial START`**, the adapter as saved before training (PEFT's own way), the factors are bit for bit those
  that PEFT's `path_initial_model_for_weight_conversion` writes. This also covers `use_rslora` with patterns, which PEFT
  does not convert.
- **Without it**, if the part can be computed from W: exact PiSSA (the largest singular values) and OLoRA (the first
  columns). It is computed in float64 from W as stored, and must be known to 1 % of the delta or better than the
  rounding of the base's own dtype. If singular values r and r + 1 nearly coincide it is not, and `--initial` is
  required. In bfloat16 this way is more accurate, since PEFT rounds the initial factors but not what it subtracts. A
  base that was loaded for training in a dtype other than its stored one needs `--initial`.

The tests compare with the weights of PEFT's own merge on the base that it changed: to 5e-5 of the largest in float32,
and 2^-7 in bfloat16, where PEFT also rounds the remaining weights; no low-rank patch can hold that rounding. LoftQ also
quantizes the remainder: its patch holds what training changed, not the quantization error.

Two kinds are not converted: adapters of a tied head or embedding (PEFT subtracts the part from both, and the adapter
adds it back to one), and `olora` with GPT-2's Conv1D (PEFT subtracts something other than what the adapter adds back).
PEFT's recipe for saving sets `init_lora_weights: true`. An unconverted adapter that was saved this way looks like a
plain one, except for the `corda_config`, `lora_ga_config` or `loftq_config` left in it. Pass `--initial` for such an
adapter."""

REFUSED: Mapping[str, tuple[Mapping[str, object], str]] = {
    "any other `peft_type`": ({"peft_type": "LOHA"}, "not a low-rank sum"),
    "`pissa_niter_N`, `corda`, `lora_ga`, `loftq` without `--initial`": (
        {"init_lora_weights": "corda"},
        "the part subtracted from the base is random or depends on data",
    ),
    "`corda_config`, `lora_ga_config` or `loftq_config` without its `init_lora_weights`": (
        {"corda_config": {"corda_method": "kpm"}},
        "PEFT's recipe for saving overwrites it: pass `--initial`, or remove the field if PEFT converted the adapter",
    ),
    "any other `init_lora_weights`": ({"init_lora_weights": "newest"}, "may change the base"),
    "`target_parameters` without their factors, or for experts of an unknown family": (
        {"target_parameters": ["experts.w1"]},
        "a part is missing, or it is unclear which tensor it belongs to; experts of the [families](families.md) "
        "are supported",
    ),
    "`layer_replication`": ({"layer_replication": [[0, 2], [1, 2]]}, "adds layers that the base does not have"),
    "`alora_invocation_tokens`": ({"alora_invocation_tokens": [1]}, "acts on part of the text, so it is not a weight"),
    "`arrow_config`": ({"arrow_config": {"top_k": 3}}, "routes between adapters"),
    "`use_qalora`": ({"use_qalora": True}, "acts on pooled inputs"),
    "`use_bdlora`": ({"use_bdlora": {"nblocks": 2}}, "its factors are block-diagonal"),
    "`kasa_config`": ({"kasa_config": {"beta": 1}}, "has a diagonal between its factors"),
    "`velora_config`": ({"velora_config": {"a": 1}}, "may change the result"),
    "`monteclora_config`": ({"monteclora_config": {"a": 1}}, "samples its factors"),
    "`megatron_config`": ({"megatron_config": {"a": 1}}, "targets modules of another library"),
    "an unknown field": ({"newest_field": 1}, "may change the result"),
}

FACTORS = r"\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector|trainable_tokens_delta)((?:\.weight|\.bias)?)$"
SAVED = r"\.(lm_head|norm|input_layernorm|post_attention_layernorm)\.weight$"


@dataclass(frozen=True)
class Layout:
    """Other names for the tensors of an adapter than PEFT writes.

    Attributes:
        says: What such keys look like, for the page.
        rewrites: Expressions and what they are replaced by, in PEFT's keys.
        why: A part of what is said where it is refused; empty where it is read.
    """

    says: str
    rewrites: Mapping[str, str]
    why: str = ""


LAYOUT_KINDS = ("plain", "dora", "embedding", "saved norms", "saved head", "token rows", "bias of B")
"""The rows of the matrix that each layout is tried with."""

LAYOUTS: Mapping[str, Layout] = {
    "named": Layout("`lora_A.default.weight`: the adapter's name", {FACTORS: r".\1.default\2"}),
    "of another name": Layout("`lora_A.sql.weight`: any one name", {FACTORS: r".\1.sql\2"}),
    "a running model's": Layout(
        "`lm_head.modules_to_save.sql.weight`, `lora_magnitude_vector.sql.weight`",
        {FACTORS: r".\1.sql\2", r"magnitude_vector\.sql$": "magnitude_vector.sql.weight",
         SAVED: r".\1.modules_to_save.sql.weight"},
    ),
    "old": Layout("`lm_head.modules_to_save.weight`", {SAVED: r".\1.modules_to_save.weight"}),
    "compiled": Layout("`base_model.model._orig_mod.`: `torch.compile`", {r"model\.": "model._orig_mod."}),
    "sharded": Layout(
        "`layers.0._fsdp_wrapped_module.`: FSDP", {r"(\.\d+\.)": r"\1_fsdp_wrapped_module._checkpoint_wrapped_module."}
    ),
    "without prefix": Layout("no `base_model.model.` before the name", {r"^base_model\.model\.": ""}, "without"),
    "data parallel": Layout("`module.` before the name", {"^": "module."}, "without the prefix"),
    "twice": Layout("`base_model.model.` twice", {"^": "base_model.model."}, "around another adapter"),
    "originals": Layout(
        "`lm_head.original_module.weight`", {SAVED: r".\1.original_module.weight"}, "the base's own value"
    ),
    "kohya": Layout("`lora_down`, `lora_up`", {"lora_A": "lora_down", "lora_B": "lora_up"}, "kohya's names"),
    "several": Layout(
        "the names of several adapters", {r"(lora_A|embedding_A)": r"\1.one", r"(lora_B|embedding_B)": r"\1.two"},
        "2 adapters",
    ),
}  # fmt: skip

LAYOUT_NOTE = """\
Training programs that save a running model's tensors use other keys than PEFT does, and PEFT silently ignores most of
them. The layouts below are read if their meaning is certain, and `portllm capture` writes them as PEFT does; the rest
are refused, with the name of a tensor. Also refused are adapters of mlx-lm (`adapters.safetensors`), and folders with
weights in files of their own that PEFT does not load (`non_lora_trainables.bin`, `vit.safetensors`, a value head as a
pickle); the state of a training run and whole models are ignored."""
