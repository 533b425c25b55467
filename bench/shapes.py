"""Shapes of the models that are measured: those of real checkpoints, and a tiny one that proves the benchmark."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

SEVEN = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip
"""The linear layers of a block, each with the part of the block it stands in."""


@dataclass(frozen=True)
class Family:
    """What a family of models has beside Llama's blocks.

    Attributes:
        model_type: As transformers calls it.
        architecture: The class that loads it.
        norms: Of a block.
        config: Keys of its configuration that a Llama does not have, or has otherwise.
    """

    model_type: str
    architecture: str
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    config: Mapping[str, object] = field(default_factory=dict)


LLAMA = Family("llama", "LlamaForCausalLM")
MISTRAL = Family("mistral", "MistralForCausalLM", config={"sliding_window": 4096})
GEMMA_2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    config={
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6, "pad_token_id": 0,
        "bos_token_id": 2, "eos_token_id": 1,
    },
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model of Llama's blocks or nearly those, by its sizes.

    Attributes:
        name: On the command line and in the names of results.
        like: What it is, for the page.
        hidden: Width of the residual stream.
        layers: Number of blocks.
        inner: Width inside the MLP.
        heads: Query heads.
        key_heads: Key and value heads.
        vocabulary: Tokens.
        tied: The head is the embedding.
        shard_bytes: Size above which its files are split.
        contests: What `bench.speed` measures on it by default.
        family: Whose blocks they are.
        head_width: Of one head, where it is not `hidden / heads`.
    """

    name: str
    like: str
    hidden: int
    layers: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool
    shard_bytes: int
    contests: tuple[str, ...] = ()
    family: Family = LLAMA
    head_width: int | None = None

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.head_width or self.hidden // self.heads

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """The linear layers of all blocks: name to (d_out, d_in)."""
        query, key = self.heads * self.head_dim, self.key_heads * self.head_dim
        sizes = {
            "q_proj": (query, self.hidden), "k_proj": (key, self.hidden), "v_proj": (key, self.hidden),
            "o_proj": (self.hidden, query), "gate_proj": (self.inner, self.hidden),
            "up_proj": (self.inner, self.hidden), "down_proj": (self.hidden, self.inner),
        }  # fmt: skip
        return {
            f"model.layers.{layer}.{part}.{name}": sizes[name]
            for layer in range(self.layers)
            for name, part in SEVEN.items()
        }

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """All tensors of a checkpoint: name to shape."""
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        tensors |= {f"{name}.weight": size for name, size in self.modules.items()}
        for layer in range(self.layers):
            for norm in self.family.norms:
                tensors[f"model.layers.{layer}.{norm}.weight"] = (self.hidden,)
        tensors["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            tensors["lm_head.weight"] = (self.vocabulary, self.hidden)
        return tensors

    @property
    def n_params(self) -> int:
        """Parameters of the model."""
        return sum(rows * (columns[0] if columns else 1) for rows, *columns in self.tensors.values())

    def n_factors(self, rank: int) -> int:
        """Parameters of a LoRA of a rank on all seven linear layers: `rank · (d_out + d_in)` for each."""
        return sum(rank * (d_out + d_in) for d_out, d_in in self.modules.values())

    @property
    def config(self) -> dict[str, object]:
        """The `config.json` that transformers reads."""
        return {
            "architectures": [self.family.architecture],
            "model_type": self.family.model_type,
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **self.family.config,
        }


ALL = (
    "copy",
    "copy-cold",
    "merge",
    "capture",
    "weights",
    "drift",
    "drift-cold",
    "check",
    "check-100",
    "check-100-sampled",
    "port",
)
GIGABYTE = 1_000_000_000

TINY = Shape(
    "tiny", "a tiny Llama",
    hidden=64, layers=2, inner=160, heads=4, key_heads=2, vocabulary=300, tied=False, shard_bytes=100_000,
    contests=(*ALL, "fleet"),
)  # fmt: skip
LLAMA_1B = Shape(
    "1.1b", "a Llama of 1.1 B parameters",
    hidden=2048, layers=16, inner=8192, heads=32, key_heads=8, vocabulary=32_000, tied=False, shard_bytes=GIGABYTE,
    contests=ALL,
)  # fmt: skip
SMALL = Shape(
    "16m", "a small Llama of 16 M parameters, for a fleet",
    hidden=384, layers=6, inner=1024, heads=6, key_heads=2, vocabulary=8_000, tied=False, shard_bytes=GIGABYTE,
    contests=("fleet",),
)  # fmt: skip
LARGE_VOCABULARY = replace(
    LLAMA_1B,
    name="1b-128k",
    like="Llama-3.2-1B's shapes: a vocabulary of 128,256, head tied",
    vocabulary=128_256,
    tied=True,
    contests=("copy", "merge", "drift", "check", "port"),
)
LLAMA_8B = Shape(
    "8b", "Llama-3.1-8B's shapes",
    hidden=4096, layers=32, inner=14_336, heads=32, key_heads=8, vocabulary=128_256, tied=False,
    shard_bytes=5 * GIGABYTE, contests=("copy", "check", "port"),
)  # fmt: skip

MISTRAL_7B = Shape(
    "mistral-7b", "Mistral-7B's shapes",
    hidden=4096, layers=32, inner=14_336, heads=32, key_heads=8, vocabulary=32_000, tied=False,
    shard_bytes=5 * GIGABYTE, family=MISTRAL,
)  # fmt: skip
LLAMA_2_7B = Shape(
    "llama2-7b", "Llama-2-7B's shapes",
    hidden=4096, layers=32, inner=11_008, heads=32, key_heads=32, vocabulary=32_000, tied=False,
    shard_bytes=5 * GIGABYTE,
)  # fmt: skip
GEMMA_2_9B = Shape(
    "gemma2-9b", "Gemma-2-9B's shapes",
    hidden=3584, layers=42, inner=14_336, heads=16, key_heads=8, vocabulary=256_000, tied=True,
    shard_bytes=5 * GIGABYTE, family=GEMMA_2, head_width=256,
)  # fmt: skip

SHAPES = {shape.name: shape for shape in (TINY, SMALL, LLAMA_1B, LARGE_VOCABULARY, LLAMA_8B)}
"""Those of `bench.speed`."""

PAPER = {
    shape.name: shape
    for shape in (MISTRAL_7B, LLAMA_2_7B, replace(LLAMA_8B, name="llama3.1-8b", contests=()), GEMMA_2_9B)
}
"""The four models of the paper."""
