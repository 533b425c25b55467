"""Families of models: facts on the names and layouts of their tensors. Data, in `families/*.toml`; no code knows one.

A tensor has one *current* name: the one it has in the model that transformers 5 builds, which is also what PEFT's keys
are made of. A file may spell it otherwise: as transformers 4 did, or without what stands in front when a model was
saved without its head. Each such spelling is a list of rewrites from its names to the current ones. A rewrite that
begins with a dot may stand anywhere in a name, any other stands at its beginning.

A model's own facts are attributes of its `Checkpoint`, which alone asks here.
"""

import importlib.resources
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

Rewrite = tuple[str, str]
"""What stands in a name of a spelling, and what stands in its place in the current name."""

_OF_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class Family:
    """What is known of a family of models.

    Attributes:
        id: Name of its file.
        title: Name for people.
        model_types: What `config.json` may say.
        architectures: What it may say where it has no model type.
        embedding: Current name of the input embedding.
        head: Current name of the output head; it may be tied, and then not be in the file.
        linear: The ends of the names of its linear modules, but for the head.
        source: Where these facts are from.
        transposed: Those of them whose weight is stored as (d_in, d_out).
        experts: By the name of a fused tensor of all experts, the modules of one expert that it is made of, in order.
        spellings: Rewrites by the name of the spelling.
    """

    id: str
    title: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    embedding: str
    head: str
    linear: tuple[str, ...]
    source: str
    transposed: tuple[str, ...] = ()
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    spellings: Mapping[str, tuple[Rewrite, ...]] = field(default_factory=dict)

    def current_name(self, name: str) -> str:
        """The current name of a tensor or module, however it is spelled.

        Example:
            >>> family_named("gpt2").current_name("h.0.attn.c_attn.weight")
            'transformer.h.0.attn.c_attn.weight'
            >>> family_named("mixtral").current_name("model.layers.0.block_sparse_moe.gate.weight")
            'model.layers.0.mlp.gate.weight'
        """
        for rewrites in self.spellings.values():
            name = _rewritten(name, rewrites)
        return name

    def is_linear(self, module: str) -> bool:
        """Whether a module is a linear layer.

        Example:
            >>> family_named("gpt2").is_linear("h.0.mlp.c_fc"), family_named("gpt2").is_linear("wpe")
            (True, False)
        """
        return _ends(module, self.linear) or self.current_name(module) == self.head.removesuffix(".weight")

    def is_transposed(self, module: str) -> bool:
        """Whether a module's weight is stored as (d_in, d_out)."""
        return _ends(module, self.transposed)

    def is_of_expert(self, module: str) -> bool:
        """Whether a module is a part of one of many experts.

        Example:
            >>> family = family_named("qwen-moe")
            >>> [family.is_of_expert(f"model.layers.0.mlp.{name}.up_proj") for name in ("experts.3", "shared_expert")]
            [True, False]
        """
        return bool(self.experts) and _OF_EXPERT.search(module) is not None


def family_of(config: Mapping[str, object]) -> Family | None:
    """The family of a model, from its `config.json`; None for one that is not known.

    Example:
        >>> family_of({"model_type": "qwen3"}).title
        'Qwen 2, 2.5, 3'
        >>> family_of({"model_type": "resnet"}) is None
        True
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str):
        return next((family for family in families() if model_type in family.model_types), None)
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return next((family for family in families() if first in family.architectures), None)


def family_named(name: str) -> Family:
    """The family of this id."""
    return next(family for family in families() if family.id == name)


def order_of(parameters: Collection[str]) -> tuple[str, ...] | None:
    """The order in which the experts' module of some family has these parameters; None where no family has them.

    Example:
        >>> order_of(["down_proj", "gate_up_proj"])
        ('gate_up_proj', 'down_proj')
    """
    found = (tuple(name for name in family.experts if name in parameters) for family in families())
    return next((order for order in found if len(order) == len(parameters)), None)


@cache
def families() -> tuple[Family, ...]:
    """Every family that is known, by id."""
    folder = importlib.resources.files("portllm.checkpoint.model").joinpath("families")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    return tuple(_parsed(file.name.removesuffix(".toml"), file.read_text(encoding="utf-8")) for file in files)


def _parsed(name: str, text: str) -> Family:
    facts = _frozen(tomllib.loads(text))
    facts["spellings"] = {entry["name"]: entry["rewrites"] for entry in facts.get("spellings", ())}
    return Family(id=name, **facts)


def _frozen(value: Any) -> Any:  # noqa: ANN401 (whatever TOML can hold)
    """The same value with tuples for lists."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    return {key: _frozen(item) for key, item in value.items()} if isinstance(value, dict) else value


def _rewritten(name: str, rewrites: Iterable[Rewrite]) -> str:
    name += "."  # so that a module is found as its tensors are
    for old, new in rewrites:
        if old.startswith("."):
            name = name.replace(old, new)
        elif name.startswith(old):
            name = new + name.removeprefix(old)
    return name[:-1]


def _ends(module: str, ends: tuple[str, ...]) -> bool:
    return any(module == end or module.endswith(f".{end}") for end in ends)
