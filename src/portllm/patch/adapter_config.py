"""PEFT's `adapter_config.json`, understood whole or refused: ranks, scales and the modules it names. Pure.

PEFT ignores what it does not know; here a field that changes the result and is not understood is an error, because a
patch that loses a part of itself in silence is worse than none.

Source: `LoraConfig` and `check_target_module_exists` of PEFT 0.21 (https://github.com/huggingface/peft); the rules
below restate their behavior.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

from portllm.checkpoint.model.names import is_embedding
from portllm.errors import AdapterFormatError
from portllm.patch.adapter_start import changed_base, is_known_init
from portllm.patch.name_pattern import NamePattern, takes_python_long

LORA = "LORA"
ALL_LINEAR = "all-linear"
TIED_NAMES = ("embed_tokens", "lm_head")
"""`EMBEDDING_LAYER_NAMES` of PEFT."""

HEAD_NAMES = ("lm_head", "score", "classifier")

IGNORED_FIELDS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
        "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
        "revision", "runtime_config", "task_type",
    }
)  # fmt: skip
"""Fields that change how an adapter was or will be trained, or name things; never what its tensors mean."""

UNDERSTOOD_FIELDS = frozenset(
    {
        "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "init_lora_weights",
        "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "r", "rank_pattern",
        "target_modules", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
    }
)  # fmt: skip

NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
    "velora_config": (None,),
}
"""Fields that would change the result in a way not supported, and the values with which they do not."""

MAX_COMPARISONS = 10**8
"""Of a module with a name or pattern of a configuration, at most: a minute. Every module of the largest models with a
rank of its own takes a hundredth of it."""

ANY_LAYER = NamePattern("", before=r".*?\.[^.]*\.(?P<index>\d+)\.")
"""Finds the number of a layer where no name of the list of layers is given."""

NAMING_FIELDS = (
    "alpha_pattern", "exclude_modules", "layers_to_transform", "modules_to_save", "rank_pattern", "target_modules",
    "target_parameters",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A LoRA configuration in which every field is understood.

    Attributes:
        fields: The file's content, as it was read.
    """

    fields: Mapping[str, object]

    def rank_of(self, module: str) -> int:
        """The rank that the configuration gives a module."""
        return cast(int, _by_pattern(self._mapping("rank_pattern"), module, self.fields["r"]))

    def scale_of(self, module: str) -> float:
        """The scale of a module's delta: alpha / rank, or alpha / √rank where `use_rslora` is set.

        Example:
            >>> config = parse_adapter_config({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"],
            ...                                "alpha_pattern": {"h.1.q": 2}}, where="adapter")
            >>> config.scale_of("h.0.q"), config.scale_of("h.1.q")
            (2.0, 0.5)
        """
        rank, alpha = self.rank_of(module), self.alpha_of(module)
        return alpha / math.sqrt(rank) if self.fields.get("use_rslora") else alpha / rank

    def alpha_of(self, module: str) -> float:
        """The alpha that the configuration gives a module."""
        return cast(float, _by_pattern(self._mapping("alpha_pattern"), module, self.fields.get("lora_alpha", 8)))

    @property
    def changed_base(self) -> str | None:
        """How PEFT changed the base before training, such as `pissa`; None where it left it as it was."""
        return changed_base(self.fields)

    @property
    def names_parameters(self) -> bool:
        """Whether it adapts parameters by their own names, as those of experts that are one tensor."""
        return bool(self.fields.get("target_parameters"))

    def parameters_of(self, module: str) -> tuple[str, ...]:
        """Those parameters of a module that `target_parameters` names, sorted.

        Example:
            >>> fields = {"peft_type": "LORA", "r": 1, "target_modules": [], "target_parameters": ["experts.w1", "w2"]}
            >>> config = parse_adapter_config(fields, where="adapter")
            >>> config.parameters_of("h.0.experts"), config.parameters_of("h.0.shared")
            (('w1', 'w2'), ('w2',))
        """
        named = cast(list[str], self.fields.get("target_parameters") or [])
        found = {name.rpartition(".")[2] for name in named if _names([name], f"{module}.{name.rpartition('.')[2]}")}
        return tuple(sorted(found))

    def targets(self, modules: Iterable[str]) -> list[str]:
        """Those of a model's linear modules that the configuration names.

        Raises:
            AdapterFormatError: There are more names than can be compared with so many modules.
        """
        modules = list(modules)
        self.check_effort(len(modules))
        return [module for module in modules if self._is_target(module)]

    def check_effort(self, n_modules: int) -> None:
        """See to it that so many modules can be compared with every name and pattern of the configuration.

        Raises:
            AdapterFormatError: They cannot, within `MAX_COMPARISONS`.
        """
        named = {name: len(value) for name in NAMING_FIELDS if isinstance(value := self.fields.get(name), list | dict)}
        if sum(named.values()) * n_modules > MAX_COMPARISONS:
            longest = max(named, key=lambda name: named[name])
            raise AdapterFormatError(
                f"adapter_config.json: '{longest}' has {named[longest]} entries, too many to match against "
                f"{n_modules} tensors. Name modules by their suffixes."
            )

    def takes_peft_long(self, modules: Iterable[str]) -> bool:
        """Whether PEFT could take forever to find what is meant among modules: it has Python's engine alone."""
        patterns = [pattern for name, value in self.fields.items() for pattern in _patterns_in(name, value)]
        return takes_python_long(patterns, modules)

    @property
    def means_all_linear(self) -> bool:
        """Whether it names no modules, but all linear ones of the model except for its head."""
        targets = self.fields["target_modules"]
        return isinstance(targets, str) and targets.lower() == ALL_LINEAR

    @property
    def is_transposed(self) -> bool:
        """Whether the weights of its modules are stored as (d_in, d_out), as GPT-2's are."""
        return bool(self.fields.get("fan_in_fan_out"))

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is a DoRA."""
        return bool(self.fields.get("use_dora"))

    @property
    def has_bias_deltas(self) -> bool:
        """Whether `lora_B` has a bias."""
        return bool(self.fields.get("lora_bias"))

    @property
    def biases(self) -> str:
        """Which biases were trained: `none`, `lora_only` or `all`."""
        return cast(str, self.fields.get("bias") or "none")

    def saves(self, tensor: str) -> bool:
        """Whether a tensor belongs to a module that is saved whole.

        PEFT finds such modules by the end of their names, without regard to dots: `norm` means `input_layernorm` too.

        Example:
            >>> fields = {"peft_type": "LORA", "r": 1, "target_modules": ["q"], "modules_to_save": ["norm"]}
            >>> config = parse_adapter_config(fields, where="adapter")
            >>> config.saves("h.0.input_layernorm.weight"), config.saves("h.0.q.weight")
            (True, False)
        """
        names = tuple(cast(list[str], self.fields.get("modules_to_save") or []))
        parts = tensor.split(".")[:-1]
        return bool(names) and any(".".join(parts[:end]).endswith(names) for end in range(1, len(parts) + 1))

    def saving(self, modules: Iterable[str]) -> "AdapterConfig":
        """The configuration with more modules among those that are saved whole, none of which becomes tied by that."""
        named = cast(list[str], self.fields.get("modules_to_save") or [])
        changed = {**self.fields, "modules_to_save": [*named, *sorted(modules)]}
        if self.fields.get("ensure_weight_tying"):
            changed["ensure_weight_tying"] = self.keeps_ties("modules_to_save") or self.keeps_ties("target_modules")
        return AdapterConfig(changed)

    def keeps_ties(self, field: Literal["modules_to_save", "target_modules"]) -> bool:
        """Whether what is done to an embedding that a field names is done to a head that is tied to it, and stored.

        PEFT looks for these names alone, whatever the model calls its embedding.
        """
        if not self.fields.get("ensure_weight_tying"):
            return False
        named = self.fields.get(field) or []
        if isinstance(named, str):
            return any(_names(named, name) for name in TIED_NAMES)
        return any(name.rpartition(".")[2] in TIED_NAMES for name in cast(list[str], named))

    def token_rows_of(self, module: str) -> tuple[int, ...]:
        """The token ids whose rows of an embedding were trained; empty for a module that has none."""
        tokens = self.fields.get("trainable_token_indices") or []
        if isinstance(tokens, dict):
            matching = [ids for name, ids in tokens.items() if module == name or module.endswith(f".{name}")]
            # Rows of a tied head may be stored though only those of the embedding are named.
            return tuple((matching or [*tokens.values()])[0]) if matching or len(tokens) == 1 else ()
        return tuple(cast(list[int], tokens))

    def _mapping(self, name: str) -> Mapping[str, object]:
        return cast(Mapping[str, object], self.fields.get(name) or {})

    def _is_target(self, module: str) -> bool:
        excluded = self.fields.get("exclude_modules")
        if excluded and _names(excluded, module):
            return False
        saved = cast(list[str], self.fields.get("modules_to_save") or [])
        if any(_at_or_below(name).match(module) for name in saved):
            return False
        targets = self.fields["target_modules"]
        if self.means_all_linear:
            return module.rsplit(".", 1)[-1] not in HEAD_NAMES and not is_embedding(module)
        if targets is None or not _names(targets, module):
            return False
        # PEFT looks at layer numbers only where the targets are a list.
        return isinstance(targets, str) or self._layer_is_chosen(
            module, by_suffix=module not in cast(list[str], targets)
        )

    def _layer_is_chosen(self, module: str, *, by_suffix: bool) -> bool:
        chosen = self.fields.get("layers_to_transform")
        if not by_suffix or chosen is None or chosen == []:
            return True
        patterns = [_before_a_number(pattern) for pattern in _as_list(self.fields.get("layers_pattern"))]
        found = (pattern.match(module) for pattern in patterns or [ANY_LAYER])
        match = next((match for match in found if match), None)
        if match is None:
            return False
        index = int(match["index"])
        return index == chosen if isinstance(chosen, int) else index in cast(list[int], chosen)


def parse_adapter_config(fields: Mapping[str, object], *, where: str) -> AdapterConfig:
    """Check every field of an adapter's configuration.

    Args:
        fields: The content of `adapter_config.json`.
        where: What to call the adapter in messages.

    Raises:
        AdapterFormatError: Not a LoRA, or a field is not understood; all problems are named at once.
    """
    kind = fields.get("peft_type")
    if kind != LORA:
        raise AdapterFormatError(
            f"'{where}': its peft_type is {kind!r}; only {LORA!r} adapters are low-rank deltas that can be ported."
        )
    problems = [problem for name in sorted(fields) if (problem := _field_problem(name, fields[name]))]
    problems += [f"'{name}' is missing" for name in ("r", "target_modules") if name not in fields]
    if "target_modules" in fields and fields["target_modules"] is None and not fields.get("target_parameters"):
        problems.append("'target_modules' is None, and 'target_parameters' names nothing either")
    if problems:
        raise AdapterFormatError(f"'{where}': adapter_config.json is not fully supported: {'; '.join(problems)}.")
    return AdapterConfig(dict(fields))


def _field_problem(name: str, value: object) -> str | None:
    """Why one field cannot be accepted, or None."""
    if name in NEUTRAL_VALUES:
        neutral = NEUTRAL_VALUES[name]
        return None if value in neutral else f"'{name}' is {_short(value)}; this kind of adapter is not supported"
    if name in IGNORED_FIELDS:
        return None
    if name not in UNDERSTOOD_FIELDS:
        return None if value in (None, False) else f"unknown field {_short(name)} ({_short(value)})"
    if name == "init_lora_weights" and not is_known_init(value):
        return f"'init_lora_weights' is {_short(value)}; whether that changes the base is unknown"
    if not _has_expected_type(name, value):
        return f"'{name}' is {_short(value)}, which has the wrong type"
    problems = ((pattern.written, pattern.problem()) for pattern in _patterns_in(name, value))
    return next(
        (f"'{name}' contains {_short(pattern)}, which {problem}" for pattern, problem in problems if problem), None
    )


def _has_expected_type(name: str, value: object) -> bool:
    is_strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
    match name:
        case "r":
            return _is_rank(value)
        case "lora_alpha":
            return _is_number(value)
        case "rank_pattern":
            return value is None or (isinstance(value, dict) and all(map(_is_rank, value.values())))
        case "alpha_pattern":
            return value is None or (isinstance(value, dict) and all(map(_is_number, value.values())))
        case "use_rslora" | "use_dora" | "lora_bias" | "fan_in_fan_out" | "ensure_weight_tying":
            return isinstance(value, bool) or value is None
        case "bias":
            return value in (None, "none", "all", "lora_only")
        case "trainable_token_indices":
            lists = value.values() if isinstance(value, dict) else [value or []]
            return all(isinstance(ids, list) and all(_is_integer(i) and i >= 0 for i in ids) for ids in lists)
        case "modules_to_save" | "target_parameters":
            return value is None or is_strings
        case "target_modules":
            return value is None or is_strings or isinstance(value, str)
        case "layers_to_transform":
            return value is None or _is_integer(value) or (isinstance(value, list) and all(map(_is_integer, value)))
        case "exclude_modules" | "layers_pattern":
            return value is None or is_strings or isinstance(value, str)
        case _:
            return True


def _patterns_in(name: str, value: object) -> list[NamePattern]:
    """The regular expressions in a field."""
    if name in ("rank_pattern", "alpha_pattern"):
        return [_at_the_end(key) for key in cast(Mapping[str, object], value or {})]
    if name == "layers_pattern":
        return [_before_a_number(pattern) for pattern in _as_list(value)]
    if name == "modules_to_save":
        return [_at_or_below(pattern) for pattern in _as_list(value)]
    if name in ("target_modules", "exclude_modules") and isinstance(value, str):
        return [NamePattern(value, whole=True)]
    return []


@lru_cache(maxsize=1 << 14)  # a configuration may give each module a rank of its own
def _at_the_end(pattern: str) -> NamePattern:
    """For modules whose name, or the end of it from a dot on, matches a pattern."""
    return NamePattern(pattern, before=r"(.*\.)?(", after=")$")


def _before_a_number(pattern: str) -> NamePattern:
    """For what ends in a layer's number behind the name of the list of layers."""
    return NamePattern(pattern, before=r"(?:^|.*?\.)", after=r"\.(?P<index>\d+)\.")


def _at_or_below(pattern: str) -> NamePattern:
    """For a module of that name and for those inside it."""
    return NamePattern(pattern, before=r"(^|.*\.)", after=r"($|\..*)")


def _as_list(value: object) -> list[str]:
    return [value] if isinstance(value, str) and value else cast(list[str], value or [])


def _by_pattern(patterns: Mapping[str, object], module: str, default: object) -> object:
    """The value of the first pattern that the end of a module's name matches, in the order of the file."""
    return next((value for key, value in patterns.items() if _at_the_end(key).match(module)), default)


def _names(chosen: object, module: str) -> bool:
    """Whether a regular expression (a string) or a list of names and endings means this module."""
    if isinstance(chosen, str):
        return NamePattern(chosen, whole=True).match(module) is not None
    names = cast(list[str], chosen)
    return module in names or any(module.endswith(f".{name}") for name in names)


def _is_number(value: object) -> bool:
    # JSON knows 1e999 and whole numbers of any length; what a float cannot hold is no scale.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_rank(value: object) -> bool:
    return _is_integer(value) and 0 < cast(int, value) < 1 << 31


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
