"""What transformers knows of a model type: asked of the classes themselves, built without memory.

A class is built on torch's meta device from its default configuration, so that nothing of it is typed in: the names of
embedding and head, what a tie joins, which modules are linear and which of them are stored transposed, the parameters
of experts, and how transformers renames and converts what a file holds. `scripts/gen_model_types.py` writes this for
every model type that transformers has a class for; a type that is not in that file is asked for when it is met.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from portllm.foreign import (
    CONFIG_MAPPING,
    REGISTRIES,
    Conv1D,
    PrefixChange,
    PreTrainedConfig,
    PreTrainedModel,
    WeightConverter,
    WeightRenaming,
    get_model_conversion_mapping,
    quiet,
    rename_source_key,
    transformers,
)

NOT_FOR_SHAPE = ("auto_map", "quantization_config", "torch_dtype", "dtype")
"""Fields of a configuration that could make transformers load or change something, and say nothing of the layout."""

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def classes_of(model_type: str) -> list[tuple[str, str]]:
    """The classes that transformers loads a model type into, each with the task that it is loaded for first."""
    found: dict[str, str] = {}
    for task, registry in REGISTRIES.items():
        named = registry.get(model_type, ())
        for name in (named,) if isinstance(named, str) else named:
            found.setdefault(name, task)
    return list(found.items())


def facts_of(model_type: str, name: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What is known of one class of a model type; whatever transformers raises where it cannot be built."""
    cls = getattr(transformers, name)
    with quiet():
        config, part = configured(CONFIG_MAPPING[model_type](**(fields or {})), cls)
        with torch.device("meta"):
            model = cls(config)
    return {"class": name, **_described(model, part)}


def facts_of_type(model_type: str, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is known of the classes that can be built from a model's own configuration."""
    found = []
    own = {name: value for name, value in fields.items() if name not in NOT_FOR_SHAPE}
    for name, task in classes_of(model_type):
        with contextlib.suppress(Exception):  # the classes are others', and raise what they like
            found.append({"task": task, **facts_of(model_type, name, own)})
    return found


def configured(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> tuple[PreTrainedConfig, str]:
    """The part of a configuration that a class is built from, as transformers' auto classes take it, and its name."""
    text = config.sub_configs.get("text_config")
    if type(config) is not cls.config_class and text is not None and cls.config_class is text:
        return config.get_text_config(), "text_config"
    return config, ""


def _described(model: PreTrainedModel, part: str) -> dict[str, Any]:
    names = {id(module): name for name, module in model.named_modules()}
    stored = list(model.state_dict())
    prefix = model.base_model_prefix
    root = sorted({name.partition(".")[0] for name in stored})
    inner = sorted({name.split(".")[1] for name in stored if name.startswith(f"{prefix}.")})
    head = _weight_name(model.get_output_embeddings, names)
    embedding = _weight_name(model.get_input_embeddings, names)
    renames, converters = _transforms(model)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    matrices = {
        name.rpartition(".")[0]
        for name, tensor in model.named_parameters()
        if name.endswith(".weight") and tensor.ndim == 2
    }
    others = _templates(matrices - linear.keys())
    return {
        "part": part,
        "part_type": model.config.model_type if part else None,
        "prefix": prefix,
        "root": root,
        "inner": inner,
        "embedding": embedding,
        "head": head,
        "ties": _ties(model, head, embedding),
        "same": _same(model, head, embedding),
        "looks_up": _looks_up(model),
        "linear": _ends(_templates(linear.keys() - {(head or "").removesuffix(".weight")}), others),
        "transposed": _ends(
            _templates(name for name, module in linear.items() if isinstance(module, Conv1D)),
            _templates(name for name, module in linear.items() if not isinstance(module, Conv1D)),
        ),
        "parameters": _parameters(model),
        "widths": _widths(model) if any("Transpose 1 2" in converter[3] for converter in converters) else {},
        "kept": _kept(model),
        "renames": renames,
        "converters": converters,
        "layers": _layers(model),
    }


def _weight_name(getter: Callable[[], nn.Module | None], names: Mapping[int, str]) -> str | None:
    """The name of the weight of what a getter of transformers returns; None where the model has no such thing."""
    try:
        module = getter()
    except (NotImplementedError, AttributeError):
        return None
    has_weight = isinstance(getattr(module, "weight", None), torch.Tensor) and id(module) in names
    return f"{names[id(module)]}.weight" if has_weight else None


def _looks_up(model: PreTrainedModel) -> bool:
    """Whether the embedding only looks up rows, or scales them by what PEFT knows as the scale too."""
    try:
        module = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return False
    plain = getattr(type(module), "forward", None) is nn.Embedding.forward
    return plain or hasattr(module, "embed_scale")


def _ties(model: PreTrainedModel, head: str | None, embedding: str | None) -> dict[str, Any] | None:
    """How head and embedding can be one matrix; see `portllm.checkpoint.model.families.Tie`."""
    if head is None or embedding is None:
        return None
    parts = {"": model.config}
    parts |= {
        name: part for name in model.config.sub_configs if (part := getattr(model.config, name, None)) is not None
    }
    said = {name: bool(getattr(part, "tie_word_embeddings", False)) for name, part in parts.items()}
    found = {name: _tied_by(model, parts, name) for name in parts}
    for name, part in parts.items():
        part.tie_word_embeddings = said[name]
    deciding = next((name for name, tied in found.items() if _root(tied, head) == _root(tied, embedding)), None)
    if deciding is None:
        return None
    tied = found[deciding]
    third = {name for name in tied if name.endswith(".weight") and _root(tied, name) == _root(tied, head)}
    third -= {head, embedding, _root(tied, head)}
    is_third = _root(tied, head) not in (head, embedding)
    follows = ["text_config"] if deciding == "" and _follows_text(model.config) else []
    return {"parts": [deciding, *follows], "default": said[deciding], "alone": not (third or is_third)}


def _same(model: PreTrainedModel, head: str | None, embedding: str | None) -> dict[str, str]:
    """By its name, a tensor that is stored under another one, but for head and embedding."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    pairs = {name: _root(tied, name) for name in sorted(tied)}
    return {name: root for name, root in pairs.items() if not {name, root} <= {head, embedding}}


def _tied_by(model: PreTrainedModel, parts: Mapping[str, PreTrainedConfig], name: str) -> dict[str, str]:
    """What is tied to what where one part of the configuration alone says that there are ties."""
    for other, part in parts.items():
        part.tie_word_embeddings = other == name
    tied: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    return tied


def _root(tied: Mapping[str, str], name: str) -> str:
    """The tensor that a name is tied to in the end."""
    while tied.get(name, name) != name:
        name = tied[name]
    return name


def _follows_text(config: PreTrainedConfig) -> bool:
    """Whether a configuration that does not say that it ties does what its part about text says."""
    text = getattr(config, "text_config", None)
    if text is None or "text_config" not in config.sub_configs:
        return False
    inner = {"tie_word_embeddings": True, "model_type": text.model_type}
    try:
        silent = type(config)(text_config={**inner, "tie_word_embeddings": False})
        return bool(type(config)(text_config=inner).tie_word_embeddings) and not silent.tie_word_embeddings
    except Exception:
        return False


def _transforms(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """How transformers renames and converts what a file holds, in its order: patterns, what they become, and where."""
    renames, converters = [], []
    for transform in get_model_conversion_mapping(model, add_legacy=False):
        scope = None if transform.scope_prefix is None else [transform.scope_prefix, transform.base_model_prefix]
        pattern = transform.compiled_sources.pattern
        if type(transform) in (WeightRenaming, PrefixChange):
            renames.append([pattern, transform.target_patterns[0], scope])
            continue
        # A rename of another kind depends on more than the name, as a conversion does.
        steps = transform.operations if isinstance(transform, WeightConverter) else [transform]
        operations = [_operation(step) for step in steps]
        converters.append([pattern, transform.source_patterns, transform.target_patterns, operations, scope])
    return renames, converters


def _kept(model: PreTrainedModel) -> list[str]:
    """Current names that the renames would change again, and that transformers therefore leaves alone."""
    renames = [
        step for step in get_model_conversion_mapping(model, add_legacy=False) if isinstance(step, WeightRenaming)
    ]
    stored = model.state_dict()
    return sorted(
        _templates(
            name
            for name in stored
            if rename_source_key(name, renames, [], model.base_model_prefix, stored)[0] not in stored
        )
    )


def _operation(step: object) -> str:
    axes = [str(getattr(step, name)) for name in ("dim", "dim0", "dim1") if hasattr(step, name)]
    return " ".join([type(step).__name__, *axes])


def _templates(names: Iterable[str]) -> set[str]:
    return {NUMBER.sub("*", f".{name}.")[1:-1] for name in names}


def _ends(names: set[str], others: set[str]) -> list[str]:
    """The shortest ends that mean these modules and none of the others."""
    ends: set[str] = set()
    for name in sorted(names):
        parts = name.split(".")
        for size in range(1, len(parts) + 1):
            end = ".".join(parts[-size:])
            if parts[-size] != "*" and not any(f".{other}".endswith(f".{end}") for other in others):
                ends.add(end)
                break
        else:
            ends.add(f"^{name}")
    return sorted(ends)


def _parameters(model: PreTrainedModel) -> dict[str, Any]:
    """The tensors of more than two axes that PEFT can adapt by their names, and whether they are (in, out)."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False):
            if tensor.ndim == 3 and leaf not in ("weight", "bias") and not isinstance(module, nn.modules.conv._ConvNd):
                end = ".".join([name.rpartition(".")[2], leaf])
                found[end] = bool(getattr(module, "is_transposed", False))
    return found


def _widths(model: PreTrainedModel) -> dict[str, int]:
    """The axis of those tensors that has the width of the residual stream, by which a transposed one is known."""
    width = model.config.get_text_config().hidden_size
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    found = {}
    for end in _parameters(model):
        axes = {
            shape.index(width, 1) for name, shape in shapes.items() if name.endswith(f".{end}") and width in shape[1:]
        }
        if len(axes) == 1:
            found[end] = axes.pop()
    return found


def _layers(model: PreTrainedModel) -> dict[str, str]:
    """By the name of a list of layers, the field of the configuration that says how many there are."""
    text = model.config.get_text_config()
    where = next((key for key in model.config.sub_configs if getattr(model.config, key, None) is text), "")
    key = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    count = getattr(text, key, None)
    owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and not NUMBER.search(f".{name}."):
            owner = max((other for other in owners if not other or name.startswith(f"{other}.")), key=len)
            if owners[owner].config in (text, model.config):
                found[name] = ".".join(filter(None, (where, key)))
    return found
