"""Models, tokenizers and adapters in memory: the only module that has transformers and peft load something.

Everything is loaded from folders on disk, by safetensors, without code from the folder and without the network: of a
folder only what `cleared` lets pass reaches them, and each choice that a file could make is made here.
"""

import contextlib
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.modules import module as hooks

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import AdapterFormatError, CheckpointError, PortLLMError
from portllm.foreign import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LoraConfig,
    PeftModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    foreign,
    get_peft_model,
    get_peft_model_state_dict,
    no_init_weights,
    quiet,
)
from portllm.patch.adapter_keys import Role
from portllm.running.budget import no_more_than
from portllm.running.cleared import cleared_adapter, cleared_model, cleared_tokenizer
from portllm.running.device import Device, Dtype

__all__ = [
    "Device",
    "PeftModel",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "add_adapter",
    "add_fresh_lora",
    "attach_adapter",
    "build_skeleton",
    "choose_device",
    "compute_dtype",
    "continue_lora",
    "detach_adapter",
    "load_model",
    "load_tokenizer",
    "quiet",
    "save_adapter",
    "save_memory",
    "save_model",
]

BASE_WEIGHT = Role.BASE_WEIGHT.value

SHORT = 512
"""Tokens up to which eager attention is used on a CPU.

Below it, it is faster than the fused kernel (own measurement: by 10 % to 30 % at 16 to 64 tokens); above it, its
matrix of scores, quadratic in the tokens, costs too much memory.
"""

NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16")
"""What torch calls the instructions of a CPU that multiply bfloat16."""


def choose_device(device: Device = "auto") -> torch.device:
    """The device to run on; `auto` is the first CUDA device where there is one, otherwise the CPU.

    Raises:
        PortLLMError: CUDA is asked for and this torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise PortLLMError("device 'cuda': torch finds no CUDA device. Use 'cpu' or 'auto'.")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in with weights of a stored dtype: the same, unless the processor only emulates it.

    A processor without instructions for bfloat16 takes two to twelve times as long as in float32 (own measurement, with
    AVX-512 and AVX2 alone), and one that has some for float16 is rare.
    """
    if device.type != "cpu" or stored not in (torch.bfloat16, torch.float16):
        return stored
    ask = getattr(torch.cpu, "get_capabilities", None)  # older versions of torch cannot say; float32 is never wrong
    able = ask() if ask else {}
    is_native = any(able.get(name) for name in NATIVE_BFLOAT16) and onednn_uses_bfloat16()
    return stored if stored == torch.bfloat16 and is_native else torch.float32


def onednn_uses_bfloat16() -> bool:
    """Whether oneDNN, which multiplies matrices of bfloat16, may use instructions for them (`ONEDNN_MAX_CPU_ISA`)."""
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(ask and ask())


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint folder; it has read a text already.

    Raises:
        CheckpointError: The folder has none that transformers can load, and that reads a text.
    """

    def failed(why: str) -> CheckpointError:
        return CheckpointError(
            f"'{folder}': transformers cannot load its tokenizer: {why} "
            "Expected 'tokenizer.json' and 'tokenizer_config.json'; copy them from the model's own folder."
        )

    with cleared_tokenizer(Path(_existing(folder))) as cleared, quiet(), foreign(failed):
        tokenizer = AutoTokenizer.from_pretrained(str(cleared), local_files_only=True, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise TypeError(f"{type(tokenizer).__name__} does not read 'tokenizer.json'")
        tokenizer.name_or_path = str(folder)
        tokenizer.decode(tokenizer("A text, the 1st.", add_special_tokens=True)["input_ids"], skip_special_tokens=True)
    return tokenizer


def load_model(
    folder: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype | Dtype = "auto",
    longest: int = SHORT,
    n_rows: int | None = None,
) -> PreTrainedModel:
    """The causal language model in a checkpoint folder, in evaluation mode.

    Args:
        folder: Configuration and safetensors files.
        device: Where its weights go.
        dtype: Of its weights in memory; `auto` is that of `compute_dtype`. The one they are stored in stays in
            `model.config.dtype`.
        longest: Tokens of the longest input that it will be given; chooses the attention kernel on a CPU.
        n_rows: Of its embedding and head, where an adapter needs more than they have; the others are zeros.

    Raises:
        CheckpointError: The folder has no model that transformers can load and run, or its configuration describes
            another one than its weights.
    """

    def failed(why: str) -> CheckpointError:
        return CheckpointError(
            f"'{folder}': transformers cannot load it as a causal language model: {why} "
            "Expected 'config.json' and safetensors files of one model."
        )

    checkpoint = open_checkpoint(_existing(folder))
    with cleared_model(checkpoint) as cleared, quiet(), foreign(failed), no_more_than(checkpoint):
        model, found = AutoModelForCausalLM.from_pretrained(
            str(cleared),
            config=AutoConfig.from_pretrained(str(cleared), local_files_only=True, trust_remote_code=False),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            use_kernels=False,
            dtype="auto",
            attn_implementation="eager" if device.type == "cpu" and longest <= SHORT else None,  # None: torch's own
            experts_implementation=None,
            output_loading_info=True,
        )
        model.name_or_path = model.config.name_or_path = str(folder)
    if found["missing_keys"]:
        raise failed(f"its weights lack {len(found['missing_keys'])} tensors, first '{min(found['missing_keys'])}'.")
    if n_rows is not None:
        _add_rows(model, n_rows)
    by_name = {"auto": compute_dtype(model.dtype, device), "float32": torch.float32}
    _cast_weights(model, by_name[dtype] if isinstance(dtype, str) else dtype)
    model.to(device)
    model.eval()
    head = model.get_output_embeddings()
    accepted = inspect.signature(model.forward).parameters
    lacking = [name for name in ("attention_mask", "position_ids", "logits_to_keep") if name not in accepted]
    if lacking or head is None:
        raise CheckpointError(
            f"'{folder}': transformers' {type(model).__name__} does not support "
            f"{', '.join(lacking) or 'output embeddings'}, so padded batches cannot be run on it. Use a decoder "
            "model with rotary or learned positions."
        )
    # The head is given a slice of the hidden states. Where it is frozen, torch multiplies a slice row by row, each time
    # with a copy of the whole head: two thirds of a small model's time (own measurement).
    head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    _check_rows(model, checkpoint)
    with quiet(), foreign(failed):
        _try(model, device)
    return model


@torch.no_grad()
def _add_rows(model: PreTrainedModel, n_rows: int) -> None:
    """Gives embedding and head more rows, of zeros."""
    there = model.get_input_embeddings().weight.shape[0]
    with quiet():
        model.resize_token_embeddings(n_rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in () if module is None else module.parameters():
            parameter[there:] = 0


def build_skeleton(folder: str | Path, *, longest: int = SHORT) -> PreTrainedModel:
    """The causal language model in a checkpoint folder without its weights, in evaluation mode.

    Its parameters are on the meta device; what it computes from its configuration alone, such as the frequencies of
    rotary positions, is there, on the CPU in float32.

    Args:
        folder: Configuration and safetensors files.
        longest: Tokens of the longest input that it will be given; chooses the attention kernel.

    Raises:
        CheckpointError: transformers has no such model.
    """

    def failed(why: str) -> CheckpointError:
        return CheckpointError(f"'{folder}': transformers cannot build it as a causal language model: {why}")

    def to_meta(_module: torch.nn.Module, _name: str, parameter: torch.nn.Parameter | None) -> Any:  # noqa: ANN401
        # Memory that nothing was written to yet costs nothing, and is given back before the next parameter.
        return None if parameter is None else torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    checkpoint = open_checkpoint(_existing(folder))
    hook = hooks.register_module_parameter_registration_hook(to_meta)
    try:
        with cleared_model(checkpoint) as cleared, quiet(), foreign(failed), no_init_weights():
            config = AutoConfig.from_pretrained(str(cleared), local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(
                config,
                trust_remote_code=False,
                dtype=torch.float32,
                attn_implementation="eager" if longest <= SHORT else "sdpa",
            )
    finally:
        hook.remove()
    return model.eval()


def _check_rows(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """From here on, an id or a position without a row in its embedding is refused, as a GPU would not."""

    def check(name: str, n_rows: int, inputs: tuple[object, ...]) -> None:
        ids = inputs[0] if inputs else None
        if isinstance(ids, torch.Tensor) and ids.numel() and (row := int(ids.max())) >= n_rows:
            raise CheckpointError(
                f"'{checkpoint.name}': its '{name}' has {n_rows} rows, but row {row} is requested. Use the "
                "model's own tokenizer, or fewer tokens."
            )

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: check(name, module.num_embeddings, inputs)
            )


@torch.no_grad()
def _try(model: PreTrainedModel, device: torch.device) -> None:
    """Runs a model over two tokens, since a configuration can be wrong in what only a run makes use of."""
    ids = torch.tensor([[0, 0]], device=device)
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.tensor([[0, 1]], device=device),
        logits_to_keep=1,
    )
    if output.logits.shape[:2] != (1, 1):
        raise ValueError(f"its output has the shape {tuple(output.logits.shape)}")


def add_fresh_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int,
    target_modules: str | Sequence[str],
    use_rslora: bool,
    dropout: float,
) -> PeftModel:
    """The model with a new LoRA adapter on it: A random, B zero, both float32, all else frozen.

    Raises:
        AdapterFormatError: No module of the model has a name among `target_modules`.
    """

    def failed(why: str) -> AdapterFormatError:
        return AdapterFormatError(
            f"target modules {target_modules!r}: PEFT cannot apply LoRA there: {why} Name linear modules of the "
            "model, or use 'all-linear'."
        )

    with quiet(), foreign(failed):
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=alpha,
            target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
            use_rslora=use_rslora,
            lora_dropout=dropout,
        )
        return get_peft_model(model, config)


def continue_lora(model: PreTrainedModel, folder: str | Path, *, dropout: float) -> PeftModel:
    """The model with the adapter in a folder on it, to be trained on: its factors float32, all else frozen.

    Raises:
        AdapterFormatError: peft cannot load it, or not all of it lands on the model.
    """
    with _adapter(folder, model) as where:
        config = LoraConfig.from_pretrained(where)
        config.lora_dropout = dropout
        model = PeftModel.from_pretrained(
            model, where, config=config, is_trainable=True, local_files_only=True, torch_device=str(model.device)
        )
        landed = _names_of(model, name="default")
    _check_landed(landed, folder)
    return model


def save_memory(model: PeftModel) -> None:
    """Activations are computed again for the backward pass instead of being kept (gradient checkpointing)."""
    with quiet():  # the older of two names for it, which all supported versions have
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Writes the adapter as PEFT does, so that two equal adapters are equal bytes.

    PEFT keeps target modules in a set, whose order changes from run to run, and adds a model card that says nothing
    yet; the list is sorted and the card left out.
    """
    with quiet():
        model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    _share(folder, like="adapter_config.json")
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes weights, in the dtype that they came in, and configuration, as transformers does; no tokenizer."""
    _cast_weights(model, model.config.dtype)
    with quiet():
        model.save_pretrained(folder)
    _share(folder, like="config.json")


def _share(folder: Path, *, like: str) -> None:
    """Gives weights the mode of another file: safetensors makes its files readable by their owner alone."""
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / like, file)


def _cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts parameters in place; buffers stay, since the frequencies of rotary positions are float32 for a reason."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def attach_adapter(model: PreTrainedModel, folder: str | Path, *, name: str) -> PeftModel:
    """The model with the adapter in a folder on it, not merged and not trainable, under the name given.

    Raises:
        AdapterFormatError: peft cannot load it, or not all of it lands on the model.
    """
    with _adapter(folder, model) as where:
        patched = PeftModel.from_pretrained(
            model, where, adapter_name=name, is_trainable=False, local_files_only=True, torch_device=str(model.device)
        )
        landed = _names_of(patched, name=name)
    # The weight of a resized embedding that factors lie on is stored with them, and loaded over the model's.
    _check_landed(landed, folder, beside={key for key in patched.state_dict() if key.endswith(BASE_WEIGHT)})
    return patched


def add_adapter(model: PeftModel, folder: str | Path, *, name: str) -> None:
    """Puts a further adapter beside those that the model has; `model.set_adapter(name)` switches to it.

    Raises:
        AdapterFormatError: peft cannot load it, or not all of it lands on the model.
    """
    with _adapter(folder, model) as where:
        model.load_adapter(
            where, adapter_name=name, is_trainable=False, local_files_only=True, torch_device=str(model.device)
        )
        landed = _names_of(model, name=name)
    _check_landed(landed, folder)


def detach_adapter(model: PeftModel) -> PreTrainedModel:
    """The model as it was before an adapter of LoRA layers alone was put on it; what else one changes stays changed."""
    with quiet():
        return model.unload()


@contextlib.contextmanager
def _adapter(folder: str | Path, model: PreTrainedModel | PeftModel) -> Iterator[str]:
    """A folder from which peft loads an adapter, and the border for the block in which it does."""

    def failed(why: str) -> AdapterFormatError:
        return AdapterFormatError(
            f"'{folder}': PEFT cannot load it onto this model: {why} Check that the adapter was made on a model "
            "with the same shapes."
        )

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(folder) / name).is_file():
            raise AdapterFormatError(f"'{folder}': has no '{name}'; expected an adapter folder as PEFT writes it.")
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = [name for name, _ in bare.named_modules()]
    with cleared_adapter(Path(folder), modules) as cleared, quiet(), foreign(failed):
        yield str(cleared)


def _names_of(model: PeftModel, *, name: str) -> set[str]:
    return set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))


def _check_landed(landed: set[str], folder: str | Path, *, beside: Set[str] = frozenset()) -> None:
    # peft passes over tensors that match no module with a warning, and leaves modules without tensors at zero.
    with safe_open(os.path.join(folder, "adapter_model.safetensors"), framework="pt") as file:
        stored = set(file.keys())
    for names, fate in (
        (stored - landed - beside, "match no module of the model"),
        (landed - stored, "are not in the adapter"),
    ):
        if names:
            raise AdapterFormatError(
                f"'{folder}': {len(names)} tensors {fate}, first '{min(names)}'. Check that the adapter was made "
                "on a model with the same layers."
            )


def _existing(folder: str | Path) -> str:
    if not os.path.isdir(folder):
        raise CheckpointError(f"'{folder}': is not a folder; expected one with 'config.json' and safetensors files.")
    return str(folder)
