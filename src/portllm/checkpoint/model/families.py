"""Families of models: facts on the names and layouts of their tensors. Data, in `families/*.toml`; no code knows one.

A tensor has one *current* name: the one it has in the model that transformers 5 builds, which is also what PEFT's keys
are made of. A file may spell it otherwise: as transformers 4 did, or without what stands in front when a model was
saved without its head. Each such spelling is a list of rewrites from its names to the current ones, and is read both
ways. A rewrite that begins with a dot may stand anywhere in a name, any other stands at its beginning.
"""

import importlib.resources
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import CheckpointError

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

    def spelled(self, name: str, spelling: str) -> str:
        """A tensor or module of any spelling in the one of this name.

        Example:
            >>> family_named("gemma3-vision").spelled("lm_head.weight", "transformers 4")
            'language_model.lm_head.weight'
        """
        return _rewritten(self.current_name(name), [(new, old) for old, new in self.spellings[spelling]])

    def spelling_of(self, names: Collection[str]) -> str | None:
        """The spelling that all these tensors or modules are named in; None where that is the current one, or none is.

        Example:
            >>> family = family_named("gpt2")
            >>> family.spelling_of(["h.0.attn.c_attn", "wte"]), family.spelling_of(["transformer.h.0.attn.c_attn"])
            ('without its head', None)
        """
        if all(self.current_name(name) == name for name in names):
            return None
        return next(
            (spelling for spelling in self.spellings if all(self.spelled(n, spelling) == n for n in names)), None
        )

    def names_of(self, name: str) -> tuple[str, ...]:
        """Every name that a tensor or module can have: as it is given, the current one, those of the spellings.

        Example:
            >>> family_named("llama").names_of("model.norm.weight")
            ('model.norm.weight', 'norm.weight')
        """
        spelled = (self.spelled(name, spelling) for spelling in self.spellings)
        return tuple(dict.fromkeys((name, self.current_name(name), *spelled)))

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


def resolve(name: str, checkpoint: Checkpoint) -> TensorInfo | None:
    """The tensor that a name means in a checkpoint, in whatever spelling either is; None where there is none.

    A tensor of exactly that name is taken first; for a model whose family is not known there is no other.

    Raises:
        CheckpointError: Two tensors of other names could be meant.
    """
    if name in checkpoint.infos:
        return checkpoint.infos[name]
    family = family_of(checkpoint.config)
    if family is None:
        return None
    found = [checkpoint.infos[other] for other in family.names_of(name) if other in checkpoint.infos]
    if len(found) > 1:
        raise _two_spellings(name, checkpoint, found)
    return found[0] if found else None


def current_tensors(checkpoint: Checkpoint) -> Mapping[str, TensorInfo]:
    """Every tensor of a checkpoint by its current name, sorted; as stored for a model whose family is not known.

    Raises:
        CheckpointError: It holds one tensor in two spellings.
    """
    family = family_of(checkpoint.config)
    if family is None:
        return checkpoint.infos
    tensors: dict[str, TensorInfo] = {}
    for name, stored in sorted((family.current_name(name), name) for name in checkpoint.infos):
        if name in tensors:
            raise _two_spellings(name, checkpoint, [tensors[name], checkpoint.infos[stored]])
        tensors[name] = checkpoint.infos[stored]
    return tensors


def respelled(checkpoint: Checkpoint, like: Collection[str]) -> Checkpoint:
    """The same checkpoint with its tensors named in the spelling that the tensors or modules `like` are named in.

    Where these are in no one spelling, the names are the current ones.
    """
    family = family_of(checkpoint.config)
    if family is None:
        return checkpoint
    spelling = family.spelling_of(like)
    named = current_tensors(checkpoint)
    if spelling is not None:
        named = {family.spelled(name, spelling): info for name, info in named.items()}
    return replace(checkpoint, infos={name: replace(info, name=name) for name, info in sorted(named.items())})


def _two_spellings(name: str, checkpoint: Checkpoint, infos: Sequence[TensorInfo]) -> CheckpointError:
    return CheckpointError(
        f"'{name}': {checkpoint.name} has {' and '.join(sorted(info.name for info in infos))}, which are two spellings "
        "of it. Save the model again with one of them."
    )


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
