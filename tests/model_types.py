"""Every model type of the table as a tiny model: adapters of each kind, merged and captured, held against PEFT.

    python -m tests.model_types [TYPE ...]    go through the types, and write what was found to model_types.json

A cell is `right` where the merged model, as transformers reloads it, has the logits of the adapter that PEFT runs
unmerged; else why PortLLM refuses, or why PEFT or transformers cannot make or run the model or the adapter.
docs/families.md says what the file says.
"""

import copy
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from portllm.capturing.tuned import capture_tuned
from portllm.checkpoint.model.asked import configured
from portllm.checkpoint.model.families import Family, families_of
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import PlanRefusedError, PortLLMError
from portllm.foreign import REGISTRIES, quiet
from portllm.merging.merge import merge
from portllm.patch.adapter_folder import load_patch

OUT = Path(__file__).with_suffix(".json")
RIGHT = "right"
NONE = "none"
"""The model has no such thing."""

LARGEST = 8_000_000
TOLERANCE = 1e-3
SIZES = {
    64: ["vocab_size", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "d_inner"],
    48: ["intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "mlp_hidden_size",
         "dff", "intermediate_size_mlp"],
    32: ["hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size", "word_embed_proj_dim",
         "hidden_dim", "projection_dim", "out_hidden_size", "vision_output_dim", "projector_input_dim",
         "projector_output_dim"],
    28: ["image_size"],
    24: ["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"],
    16: ["q_lora_rank", "kv_lora_rank", "qk_head_dim", "sliding_window", "local_attention"],
    14: ["patch_size"],
    8: ["head_dim", "d_kv", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim",
        "linear_value_head_dim", "state_size", "ssm_state_size", "mamba_d_state", "attention_window"],
    4: ["rotary_dim", "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
        "decoder_attention_heads",
        "attention_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
        "linear_num_value_heads", "linear_conv_kernel_dim", "conv_kernel", "time_step_rank", "mamba_dt_rank"],
    2: ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
        "num_decoder_layers", "num_encoder_layers", "num_key_value_heads", "num_experts_per_tok", "top_k_experts",
        "moe_k", "num_experts_per_token", "linear_num_key_heads", "eos_token_id"],
    1: ["n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "decoder_sparse_step", "bos_token_id",
        "decoder_start_token_id"],
    0: ["pad_token_id"],
}  # fmt: skip
FOUR_KEY_HEADS = ("dots3", "glm5_next")
"""Model types that have as many key heads as query heads."""

THREE_AXES = ("cosmos3", "glm4v", "glm46v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5", "qwen2_vl")
"""Model types whose positions have three axes, which share the width of a head."""

TASKS = {
    "causal": "CAUSAL_LM", "vision": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "sequence": "SEQ_CLS",
    "token": "TOKEN_CLS",
}  # fmt: skip
"""PEFT's word for what a class is loaded for."""

SMALL = {name: size for size, names in SIZES.items() for name in names}
TOKENS = torch.tensor([[5, 9, 13, 21, 34, 3, 2]])
"""The last one ends a text, which some classifiers look for."""

Cell = tuple[str, str]


def shrunk(config: Any) -> dict[str, Any]:
    """The fields with which a configuration of the same type is of a tiny model."""
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    own = {name: value for name, value in vars(config).items() if isinstance(value, int) and name not in parts}
    fields: dict[str, Any] = {
        name: SMALL[name] for name, value in own.items() if name in SMALL and not isinstance(value, bool)
    }
    kinds = {
        name: list(dict.fromkeys(value))
        for name, value in vars(config).items()
        if name.endswith("layer_types") and value
    }
    if kinds:
        n_layers = max(2, *map(len, kinds.values()))
        fields |= {name: (each * n_layers)[:n_layers] for name, each in kinds.items()}
        fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = n_layers
    if "kv_lora_rank" in own or config.model_type.startswith(FOUR_KEY_HEADS):
        fields["num_key_value_heads"] = 4
    if hasattr(config, "rope_parameters") and config.model_type.startswith(THREE_AXES):
        rope = config.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        fields["rope_parameters"] = {**rope, "mrope_section": [1, 1, 2]}
    special = [name for name in own if name.endswith(("token_id", "token_index")) and name not in SMALL]
    fields |= {name: 40 + number for number, name in enumerate(special)}
    return fields | {name: {**shrunk(part), "model_type": part.model_type} for name, part in parts.items()}


def make_model(family: Family) -> Any:
    """A tiny seeded model of a class."""
    cls = getattr(transformers, family.name)
    kind = transformers.CONFIG_MAPPING[family.id]
    config, _ = configured(kind(**shrunk(kind())), cls)
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"has {size:,} numbers however small its configuration is made")
    model = cls(config).eval().float()
    fill(model, 0, 0.15)
    return model


def fill(model: Any, seed: int, size: float, only: str = "") -> None:
    """Seeded normal numbers into every matrix whose name holds `only`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if only in name and parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def logits(model: Any) -> Any:
    """What a model says to some tokens."""
    extra = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    try:
        with torch.no_grad():
            return model(input_ids=TOKENS, use_cache=False, **extra).logits.double()
    except TypeError as error:
        if "use_cache" not in str(error):
            raise
        with torch.no_grad():
            return model(input_ids=TOKENS, **extra).logits.double()


class Sweep:
    """What becomes of adapters of one class."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.task = TASKS[family.task]
        self.cls = getattr(transformers, family.name)
        with quiet():
            made = make_model(family)
            made.save_pretrained(folder / "base")
            self.model = self.load("base")
            self.plain = logits(self.model)
            if (logits(made) - self.plain).abs().max() > TOLERANCE:
                raise ValueError("transformers does not reload what it saves")
        self.base = open_checkpoint(folder / "base")

    def load(self, name: str) -> Any:
        """The model in a folder."""
        with quiet():
            return self.cls.from_pretrained(self.folder / name, dtype=torch.float32).eval()

    def cells(self) -> dict[str, str]:
        """The outcome of every kind of adapter."""
        linear = self.linear()
        some = linear[:2]
        ends = [
            None if name is None else name.removesuffix(".weight") for name in (self.family.embedding, self.family.head)
        ]
        experts = [name for name, parameter in self.model.named_parameters() if self._is_experts(name, parameter)]
        ways: dict[str, dict[str, Any] | None] = {
            "linear": {"target_modules": linear},
            "experts": {"target_modules": some, "target_parameters": experts} if experts else None,
        }
        for what, module in zip(("embedding", "head"), ends, strict=True):
            saved = None if module is None else {"target_modules": some, "modules_to_save": [module]}
            target = None if module is None else {"target_modules": [*some, module]}
            ways |= {f"{what} saved": saved, f"{what} adapted": target}
        tokens = {ends[0]: [3, 5, 21]}
        ways["token rows"] = None if ends[0] is None else {"target_modules": some, "trainable_token_indices": tokens}
        if self.task in ("SEQ_CLS", "TOKEN_CLS"):
            ways = {name: ways[name] for name in ("linear", "experts", "embedding saved", "token rows")}
        found = {name: NONE if how is None else self.merged(name, how) for name, how in ways.items()}
        for name in ("linear", "experts"):
            found[f"{name} captured"] = self.captured(name) if found[name] == RIGHT else found[name]
        return found

    def linear(self) -> list[str]:
        """The linear modules that the model runs on text, and that PEFT can adapt; the head is none of them."""
        plain = (torch.nn.Linear.forward, transformers.pytorch_utils.Conv1D.forward)
        found: list[str] = []
        hooks = [
            module.register_forward_hook(lambda *_, name=name: found.append(name))
            for name, module in self.model.named_modules()
            if type(module).forward in plain
            and module is not self.model.get_output_embeddings()
            and f"{name}.weight" not in self.base.converted
        ]
        logits(self.model)
        for hook in hooks:
            hook.remove()
        names = [name for name in dict.fromkeys(found) if not {*name.split(".")} & {*self._barred()}]
        some = [name for name in names if name.rpartition(".")[2] in ("q_proj", "v_proj")]
        return [*some, *(name for name in names if name not in some)]

    def _barred(self) -> tuple[str, ...]:
        """What PEFT does not adapt: in models of state spaces, and what it saves whole for a task."""
        has_mamba = any("mamba" in type(module).__name__.lower() for module in self.model.modules())
        has_mamba |= self.family.id == "falcon_h1"
        saved = {"TOKEN_CLS": ("classifier", "score")}.get(self.task, ())
        return (*saved, "out_proj") if has_mamba else saved

    def _is_experts(self, name: str, parameter: Any) -> bool:
        return parameter.ndim == 3 and name.split(".")[-2] == "experts"

    def merged(self, name: str, how: dict[str, Any]) -> str:
        """Whether the merged model computes what PEFT computes with an adapter made so."""
        adapter, out = self.folder / f"{name} adapter", f"{name} merged"
        try:
            wanted = self.train(adapter, how)
        except Exception as error:
            return f"PEFT: {said(error)}"
        try:
            merge(load_patch(adapter), into=self.base, out=self.folder / out)
        except PortLLMError as error:
            return f"refused: {said(error)}"
        return self.compared(logits(self.load(out)), wanted)

    def captured(self, name: str) -> str:
        """Whether the patch captured from base and merged model, on the base, computes what the merged model does."""
        try:
            capture_tuned(self.base, open_checkpoint(self.folder / f"{name} merged"), out=self.folder / f"{name} patch")
        except PortLLMError as error:
            return f"refused: {said(error)}"
        with quiet():
            own = PeftModel.from_pretrained(copy.deepcopy(self.model), self.folder / f"{name} adapter").eval()
            if self.compared(logits(own), logits(self.load(f"{name} merged"))) != RIGHT:
                return "PEFT: does not load the adapter that it saved itself"
            patched = PeftModel.from_pretrained(copy.deepcopy(self.model), self.folder / f"{name} patch").eval()
            return self.compared(logits(patched), logits(self.load(f"{name} merged")))

    def train(self, adapter: Path, how: dict[str, Any]) -> Any:
        """Save an adapter as PEFT does, with seeded numbers for training; the logits of the model with it, unmerged."""
        with quiet():
            tuned = get_peft_model(
                copy.deepcopy(self.model), LoraConfig(r=2, lora_alpha=4, task_type=self.task, **how)
            ).eval()
            for seed, part, size in ((3, "lora_", 0.3), (5, "modules_to_save.default", 0.2), (6, "tokens_delta", 0.2)):
                fill(tuned, seed, size, part)
            tuned.save_pretrained(adapter, save_embedding_layers=False)
            return logits(tuned)

    def compared(self, found: Any, wanted: Any) -> str:
        """Whether two results are the same, and another one than the base's."""
        scale = max(1.0, wanted.abs().max().item())
        if not (wanted - self.plain).abs().max().item() > TOLERANCE * scale:
            return "PEFT: the adapter has no effect on the logits"
        error = (found - wanted).abs().max().item() / scale
        return RIGHT if error <= TOLERANCE else f"WRONG: off by {error:.2g}"


def said(error: Exception) -> str:
    """What an error says, without the names of this machine's folders."""
    reason = error.refusals[0].reason if isinstance(error, PlanRefusedError) else str(error)
    line = (reason.strip() or type(error).__name__).splitlines()[0]
    words = [Path(word.strip("'")).name if tempfile.gettempdir() in word else word for word in line.split()]
    return " ".join(words)[:200]


def swept(model_type: str) -> dict[str, dict[str, str]]:
    """The cells of every class of a model type that is loaded for text, by class."""
    rows: dict[str, dict[str, str]] = {}
    for family in families_of({"model_type": model_type}):
        if family.task not in TASKS:
            continue
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                sweep = Sweep(family, Path(folder))
            except Exception as error:
                rows[family.name] = {"model": said(error)}
                continue
            rows[family.name] = sweep.cells()
    return rows


def main(asked: list[str]) -> None:
    """Go through the types and write what was found."""
    types = asked or sorted({name for registry in REGISTRIES.values() for name in registry})
    found = json.loads(OUT.read_text()) if asked and OUT.exists() else {}
    for number, model_type in enumerate(types):
        found[model_type] = swept(model_type)
        sys.stdout.write(f"{number} of {len(types)}: {model_type} {json.dumps(found[model_type])}\n")
    OUT.write_text(json.dumps({key: found[key] for key in sorted(found) if found[key]}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
