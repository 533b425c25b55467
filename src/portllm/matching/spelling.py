"""A patch's names as the running model has them: PEFT finds modules by those alone, and ignores what has another name.

An adapter may spell them as an older transformers did, or with what a wrapper put in front. What is meant is certain
(see `Checkpoint.current_name`), but a patch in such names would load, and do nothing.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar, cast

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.patch.adapter_config import AdapterConfig
from portllm.patch.delta import Factor
from portllm.patch.patch import Patch

F = TypeVar("F", bound=Factor)
V = TypeVar("V")


def as_running(patch: Patch[F], model: Checkpoint) -> Patch[F]:
    """The patch in the names of a class that the model is loaded into; as it is where its names are such.

    Single experts, which today's transformers has in one tensor, stay as they are: PEFT converts them by their names.
    """
    tensors = (patch.values, patch.rows, patch.bias_deltas, patch.experts, patch.resized)
    modules = {*patch.deltas, *(name.rpartition(".")[0] for part in tensors for name in part)}
    renamed = {
        module: current
        for module in modules
        if not model.is_running(module) and model.is_running(current := model.current_name(module))
    }
    if not renamed or any(map(model.is_of_expert, modules)):
        return patch

    def module(name: str) -> str:
        return renamed.get(name, name)

    def tensor(name: str) -> str:
        owner, _, leaf = name.rpartition(".")
        return f"{module(owner)}.{leaf}"

    return replace(
        patch,
        deltas=_keyed(patch.deltas, module),
        values=_keyed(patch.values, tensor),
        rows=_keyed(patch.rows, tensor),
        bias_deltas=_keyed(patch.bias_deltas, tensor),
        experts=_keyed(patch.experts, tensor),
        resized=_keyed(patch.resized, tensor),
        config=_naming(patch.config, renamed, patch.deltas, {name.rpartition(".")[0] for name in patch.values}),
    )


def _keyed(part: Mapping[str, V], name: Callable[[str], str]) -> dict[str, V]:
    return dict(sorted((name(key), value) for key, value in part.items()))


def _naming(
    config: AdapterConfig, renamed: Mapping[str, str], deltas: Iterable[str], saved: Iterable[str]
) -> AdapterConfig:
    """The configuration that says the same of modules by their other names."""
    names = {module: renamed.get(module, module) for module in deltas}
    fields = dict(config.fields)
    if set(config.targets(names.values())) != set(names.values()):
        none = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))
        fields |= {**none, "target_modules": sorted(names.values())}
    if any((config.rank_of(old), config.scale_of(old)) != (config.rank_of(new), config.scale_of(new))
           for old, new in names.items()):  # fmt: skip
        patterns = {new: "^" + re.escape(new) for new in names.values()}
        fields["rank_pattern"] = {patterns[new]: config.rank_of(old) for old, new in names.items()}
        fields["alpha_pattern"] = {patterns[new]: config.alpha_of(old) for old, new in names.items()}
    kept = {module: renamed.get(module, module) for module in saved}
    if any(config.saves(f"{old}.weight") != config.saves(f"{new}.weight") for old, new in kept.items()):
        fields["modules_to_save"] = sorted(kept.values())
    tokens = fields.get("trainable_token_indices")
    if isinstance(tokens, dict):
        fields["trainable_token_indices"] = {
            renamed.get(name, name): ids for name, ids in cast(dict[str, list[int]], tokens).items()
        }
    return AdapterConfig(fields)
