"""What is known of model types: how transformers names, ties and lays out the tensors of each class it loads them into.

Data, in `model_types.json`, written by `scripts/gen_model_types.py` from transformers itself; no code knows a model.

A tensor has one *current* name: the one it has in the model that transformers 5 builds, which is also what PEFT's keys
are made of. A file may spell it otherwise: as transformers 4 did, or without what stands in front when a model was
saved without its head. `Family.current_name` renames as transformers does when it loads a file (`rename_source_key`
of transformers 5.23). What transformers not only renames but makes of other tensors has a `Conversion`.

One model type may be loaded into several classes: a vision-language model into a text model too, either into a
classifier. A model's own facts are attributes of its `Checkpoint`, which alone asks here.
"""

import importlib.util
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

FILE = "model_types.json"
SHARED = ""
"""The line of that file that holds what belongs to no model type."""

WEIGHT = ".weight"
MERGED = (("MergeModulelist 0",), ("MergeModulelist 0", "Concatenate 1"))
"""The operations that make one tensor of the matrices of all experts: stacked, and first one above the other."""

TRANSPOSED = ("Transpose 1 2",)
"""The operation that swaps the axes of each expert's matrix, where the file has it the other way round."""

_PART = re.compile(r"\*\.(.+)\.weight$")
_OF_EXPERT = re.compile(r"\.experts\.\d+\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_LAYER = re.compile(r"(.+?)\.(\d+)\.")


@dataclass(frozen=True)
class Rename:
    r"""One pattern, and what stands in the place of what it finds; `\1` is what its own group has found.

    Attributes:
        pattern: A regular expression with a named group for each of its branches.
        target: What it becomes.
        scope: The module that it is about, and what may stand in front of that; None where it is about all names.
    """

    pattern: str
    target: str
    scope: tuple[str, str] | None = None

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    def __call__(self, name: str) -> str | None:
        """The name as it becomes; None where the pattern does not find anything."""
        front, rest = "", name
        if self.scope is not None:
            inner, outer = (f"{part}." if part else "" for part in self.scope)
            front = outer + inner if name.startswith(outer + inner) else inner
            if not name.startswith(front):
                return None
            rest = name.removeprefix(front)
        match = self._compiled.search(rest)
        if match is None:
            return None
        target = self.target
        if r"\1" in target:
            branch = next(group for group, text in match.groupdict().items() if text is not None)
            target = target.replace(r"\1", match[self._compiled.groupindex[branch] + 1])
        return front + rest.replace(match[0], target, 1)


@dataclass(frozen=True)
class Conversion:
    """What transformers makes of tensors of a file when it loads them.

    Attributes:
        find: The names of the tensors that it is made of, and the first name of what is made.
        sources: Patterns of their names.
        targets: Patterns of the names of what is made of them.
        operations: What is done, in order.
    """

    find: Rename
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[str, ...]

    @property
    def merges_experts(self) -> bool:
        """Whether it only stacks the matrices of experts, which can be undone row by row."""
        return self.operations in MERGED

    @property
    def keeps_values(self) -> bool:
        """Whether what is made has the same numbers, each of which is found in the file: stacked, or transposed."""
        return self.merges_experts or self.operations == TRANSPOSED

    def made(self, name: str) -> tuple[str, ...]:
        """The names of what is made of a tensor; empty where it is not concerned."""
        first = self.find(name)
        return () if first is None else tuple(first.replace(self.targets[0], target) for target in self.targets)


@dataclass(frozen=True, slots=True)
class Tie:
    """How head and embedding of a class can be one matrix.

    Attributes:
        parts: The parts of the configuration that say so, empty for the whole; a later one is asked where those before
            it say no or nothing.
        default: What holds where none says anything.
        alone: Whether no third tensor is the same matrix.
    """

    parts: tuple[str, ...]
    default: bool
    alone: bool

    @property
    def is_seen_by_peft(self) -> bool:
        """Whether PEFT, which looks at the whole of the configuration, finds the tie for trained rows of tokens."""
        return self.parts[0] == ""


@dataclass(frozen=True)
class Family:
    """What is known of one class that transformers loads models of a type into.

    Attributes:
        id: The model type.
        name: The class.
        task: What it is loaded for: `causal`, `vision`, `sequence` and so on.
        part: The part of the configuration that it is built from; empty for the whole.
        prefix: What stands in front of the names of the model without its head.
        root: The first part of every name.
        inner: The part behind `prefix`.
        embedding: Current name of the input embedding.
        head: Current name of the output head; None for a model that has none.
        ties: How head and embedding can be one matrix; None where they never are.
        same: Other names of tensors that are one with that of a given name, such as a head's bias.
        looks_up: Whether the embedding is a matrix whose rows are taken as they are, or scaled, and nothing more.
        linear: The ends of the names of its linear modules, but for the head.
        transposed: Those of them whose weight is stored as (d_in, d_out).
        parameters: By the end of its name, a tensor of three axes that is no module's weight, and whether its last two
            are (d_in, d_out).
        widths: For those of them that a file may have transposed, the axis that is as wide as the embedding.
        layers: By the name of a list of layers, where the configuration says how many there are.
        kept: Current names that its renames would change again; `*` stands for any number in them.
        renames: In transformers' order.
        conversions: In transformers' order; the first one that finds a name counts.
    """

    id: str
    name: str
    task: str
    part: str
    prefix: str
    root: frozenset[str]
    inner: frozenset[str]
    embedding: str | None
    head: str | None
    ties: "Tie | None"
    same: Mapping[str, str]
    looks_up: bool
    linear: tuple[str, ...]
    transposed: tuple[str, ...]
    parameters: Mapping[str, bool]
    widths: Mapping[str, int]
    layers: Mapping[str, str]
    kept: frozenset[str]
    renames: tuple[Rename, ...]
    conversions: tuple[Conversion, ...]

    def current_name(self, name: str) -> str:
        """The current name of a tensor or module, however it is spelled.

        Example:
            >>> family_of({"model_type": "gpt2"}).current_name("h.0.attn.c_attn.weight")
            'transformer.h.0.attn.c_attn.weight'
            >>> family_of({"model_type": "mixtral"}).current_name("model.layers.0.block_sparse_moe.gate")
            'model.layers.0.mlp.gate'
        """
        if self.kept and _NUMBER.sub("*", f".{name}")[1:] in self.kept:
            return name
        is_module = not name.endswith((".weight", ".bias"))
        found = self._prefixed(self._renamed(name + WEIGHT if is_module else name))
        return found.removesuffix(WEIGHT) if is_module else found

    def loads(self, name: str, config: Mapping[str, Any]) -> bool:
        """Whether the model has what a current name says: it is no layer too many, and no part of another model.

        Example:
            >>> family = family_of({"model_type": "qwen3"})
            >>> names = ("model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight", "mtp.norm.weight")
            >>> [family.loads(name, {"num_hidden_layers": 2}) for name in names]
            [True, False, False]
        """
        first, _, rest = name.partition(".")
        second = rest.partition(".")[0]
        if first not in self.root or (first == self.prefix and self.inner and second not in self.inner):
            return False
        match = _LAYER.match(name)
        if match is None or match[1] not in self.layers:
            return True
        count = _value(config.get(self.part, {}) if self.part else config, self.layers[match[1]])
        return not isinstance(count, int) or int(match[2]) < count

    def says_tied(self, config: Mapping[str, Any]) -> bool | None:
        """Whether a configuration makes head and embedding one matrix; None where it says nothing about it."""
        parts = () if self.ties is None else self.ties.parts
        inner = config.get(self.part, {}) if self.part else config
        said = [_value(inner, f"{part}.tie_word_embeddings".lstrip(".")) for part in parts]
        return None if all(value is None for value in said) else any(value is True for value in said)

    def shares(self, name: str | None) -> bool:
        """Whether a tensor is one with another that is not head or embedding."""
        return any(name in pair for pair in self.same.items())

    def conversion_of(self, name: str) -> Conversion | None:
        """What transformers makes of a tensor of this current name; None where it takes it as it is.

        No pattern of a conversion has a number of its own, so that a name stands for those with other numbers.
        """
        if not self.conversions:
            return None
        alike = _NUMBER.sub("0", name)
        if alike not in self._conversions:
            found = (conversion for conversion in self.conversions if conversion.find(alike) is not None)
            self._conversions[alike] = next(found, None)
        return self._conversions[alike]

    @cached_property
    def _conversions(self) -> dict[str, Conversion | None]:
        """What has been found so far."""
        return {}

    @cached_property
    def experts(self) -> Mapping[str, tuple[str, ...]]:
        """By the last part of the name of a tensor of all experts, the modules of one that it is made of, in order."""
        found: dict[str, tuple[str, ...]] = {}
        for end in self.parameters:
            module, _, leaf = end.rpartition(".")
            if module.endswith("experts"):
                made = (c for c in self.conversions if c.merges_experts and c.targets[0].endswith(f".{leaf}"))
                sources = next((conversion.sources for conversion in made), ())
                found[leaf] = tuple(part[1] for source in sources if (part := _PART.search(source)))
        return found

    def is_linear(self, module: str) -> bool:
        """Whether a module is a linear layer.

        Example:
            >>> family = family_of({"model_type": "gpt2"})
            >>> family.is_linear("h.0.mlp.c_fc"), family.is_linear("wpe")
            (True, False)
        """
        return (
            _ends(module, self.linear)
            or self.is_of_expert(module)
            or f"{self.current_name(module)}{WEIGHT}" == self.head
        )

    def is_transposed(self, module: str) -> bool:
        """Whether a module's weight is stored as (d_in, d_out)."""
        return _ends(module, self.transposed)

    def is_of_expert(self, module: str) -> bool:
        """Whether a module is a part of one of many experts that the model has in one tensor.

        Example:
            >>> family = family_of({"model_type": "qwen3_moe"})
            >>> [family.is_of_expert(f"model.layers.0.mlp.{name}.up_proj") for name in ("experts.3", "shared_expert")]
            [True, False]
        """
        return any(self.experts.values()) and _OF_EXPERT.search(f"{module}.") is not None

    def _renamed(self, name: str) -> str:
        if self.kept and _NUMBER.sub("*", f".{name}")[1:] in self.kept:
            return name
        for rename in self.renames:
            name = rename(name) or name
        return name

    def _prefixed(self, name: str) -> str:
        """With the name of the model without its head in front, or without it, as the class has it."""
        first, _, rest = name.partition(".")
        if first == self.prefix and rest.partition(".")[0] in self.root:
            return rest
        return f"{self.prefix}.{name}" if first in self.inner and first not in self.root else name


def families_of(config: Mapping[str, Any], *, ask: bool = True) -> tuple[Family, ...]:
    """The classes that a model may be loaded into, from its `config.json`; first the one that it was saved from.

    Args:
        config: The configuration.
        ask: Whether the transformers installed here is asked of a type that is not in the file.

    Example:
        >>> config = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}
        >>> [family.name for family in families_of(config)][:2]
        ['Qwen3_5ForConditionalGeneration', 'Qwen3_5ForCausalLM']
        >>> families_of({"model_type": "resnet"})
        ()
    """
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        model_type = None if first is None else _type_of(first)
    if model_type is None:
        return ()
    known = _classes(model_type) or (_asked(model_type, config) if ask else ())
    return tuple(sorted(known, key=lambda family: family.name != first))


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The first of `families_of`; None where there is none."""
    return next(iter(families_of(config)), None)


def order_of(parameters: Collection[str]) -> tuple[str, ...] | None:
    """The order in which the experts' module of a model has these parameters; None where it is not known.

    Example:
        >>> order_of(["down_proj", "gate_up_proj"])
        ('gate_up_proj', 'down_proj')
    """
    shared = json.loads(_line(SHARED) or "{}")
    found = {tuple(name for name in order if name in parameters) for order in shared["orders"]}
    fitting = [order for order in found if len(order) == len(parameters)]
    return fitting[0] if len(fitting) == 1 else None


@cache
def _text() -> str:
    return Path(__file__).with_name(FILE).read_text(encoding="utf-8")  # loading importlib.resources takes longer


def _line(key: str) -> str | None:
    """What the file has under a key, each of which has a line of its own, so that only this one is parsed."""
    start = _text().find(f"\n{json.dumps(key)}: ")
    if start < 0:
        return None
    line = _text()[start + 1 : _text().index("\n", start + 1)]
    return line.partition(": ")[2].rstrip(",")


def _type_of(name: str) -> str | None:
    """The model type of a class."""
    place = _text().find(f'"class": "{name}"')
    if place < 0:
        return None
    found: str = json.loads(_text()[_text().rindex("\n", 0, place) + 1 :].partition(": ")[0])
    return found


@cache
def _classes(model_type: str) -> tuple[Family, ...]:
    line = _line(model_type)
    return () if line is None or model_type == SHARED else tuple(_families_in(model_type, json.loads(line)))


def _asked(model_type: str, config: Mapping[str, Any]) -> tuple[Family, ...]:
    """What the transformers installed here says of a type that is not in the file; empty where it does not know it."""
    package = importlib.util.find_spec("transformers")
    folders = () if package is None else package.submodule_search_locations or ()
    module = model_type.replace("-", "_")
    if not module.isidentifier() or not any(Path(folder, "models", module).is_dir() for folder in folders):
        return ()
    from portllm.checkpoint.model.asked import facts_of_type  # loads transformers, which few types need

    return tuple(_families_in(model_type, facts_of_type(model_type, config)))


def _families_in(model_type: str, classes: list[dict[str, Any]]) -> Iterator[Family]:
    """The classes of a model type, as the file has them: each without what is as in the one before it."""
    facts: dict[str, Any] = {}
    for changed in classes:
        facts = {**facts, **changed}
        yield Family(
            id=model_type,
            name=facts["class"],
            task=facts["task"],
            part=facts["part"],
            prefix=facts["prefix"],
            root=frozenset(facts["root"]),
            inner=frozenset(facts["inner"]),
            embedding=facts["embedding"],
            head=facts["head"],
            ties=None if facts["ties"] is None else Tie(**{**facts["ties"], "parts": tuple(facts["ties"]["parts"])}),
            same=facts["same"],
            looks_up=facts["looks_up"],
            linear=tuple(facts["linear"]),
            transposed=tuple(facts["transposed"]),
            parameters=facts["parameters"],
            widths=facts["widths"],
            layers=facts["layers"],
            kept=frozenset(facts["kept"]),
            renames=tuple(_rename(*entry) for entry in facts["renames"]),
            conversions=tuple(
                Conversion(_rename(pattern, targets[0], scope), tuple(sources), tuple(targets), tuple(operations))
                for pattern, sources, targets, operations, scope in facts["converters"]
            ),
        )


def _rename(pattern: str, target: str, scope: list[str] | None) -> Rename:
    return Rename(pattern, target, None if scope is None else (scope[0], scope[1]))


def _value(config: Any, path: str) -> Any:  # noqa: ANN401 (whatever JSON can hold)
    for part in path.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _ends(module: str, ends: tuple[str, ...]) -> bool:
    """Whether a name ends so; `*` stands for any number in it."""
    name = f".{module}"
    numberless = _NUMBER.sub("*", name)
    return any(numberless.endswith(f".{end}") or name.endswith(f".{end}") for end in ends)
