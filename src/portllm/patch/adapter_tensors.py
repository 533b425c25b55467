"""The tensors of an adapter file, sorted out: each becomes part of the patch, or the file is refused with all named."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from portllm.checkpoint.model.families import order_of
from portllm.errors import AdapterFormatError
from portllm.patch.adapter_config import AdapterConfig
from portllm.patch.adapter_keys import (
    INNER,
    PREFIX,
    Role,
    adapter_names,
    copied_tensor,
    is_original,
    is_saved,
    parse_key,
    plain_key,
    split_inner,
    why_foreign,
)
from portllm.patch.delta import ExpertsDelta, LowRankDelta, RowValues, VectorDelta, WholeValue
from portllm.patch.patch import Patch
from portllm.patch.record import PatchRecord
from portllm.tensors.info import FLOAT_DTYPES, TensorInfo

WEIGHT, BIAS = ".weight", ".bias"
EXPERTS = "experts"
"""What the module that holds the experts of a layer is called; a parameter of another module is its weight."""
SHOWN = 10
PAIRS = ((Role.A, Role.B), (Role.EMBEDDING_A, Role.EMBEDDING_B))


@dataclass(slots=True)
class _Parts:
    """What has been found so far, and what is wrong with it."""

    deltas: dict[str, LowRankDelta[TensorInfo]] = field(default_factory=dict)
    copies: dict[str, list[TensorInfo]] = field(default_factory=lambda: defaultdict(list))
    values: dict[str, WholeValue[TensorInfo]] = field(default_factory=dict)
    rows: dict[str, RowValues[TensorInfo]] = field(default_factory=dict)
    bias_deltas: dict[str, VectorDelta[TensorInfo]] = field(default_factory=dict)
    experts: dict[str, ExpertsDelta[TensorInfo]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def sort_out(
    tensors: Mapping[str, TensorInfo],
    config: AdapterConfig,
    *,
    name: str,
    record: PatchRecord | None = None,
    revision: str | None = None,
) -> Patch[TensorInfo]:
    """The patch that these tensors and this configuration are.

    Args:
        tensors: By PEFT's key.
        config: What the adapter says of itself.
        name: What to call it in messages.
        record: Where it comes from.
        revision: Its commit hash on the hub.

    Raises:
        AdapterFormatError: A tensor is not understood, or does not fit the configuration; all of them are named.
    """
    config.check_effort(len(tensors))
    parts = _Parts()
    by_module: dict[str, dict[Role, TensorInfo]] = {}
    keyed = _plain(parts, tensors)
    for key in sorted(keyed):
        found = parse_key(key)
        if found is None:
            parts.problems.append(f"tensor '{keyed[key].name}' is {why_foreign(key) or 'of no module'}")
        elif found[1] is Role.WHOLE:
            _take_whole(parts, found[0], keyed[key], config)
        else:
            by_module.setdefault(found[0], {})[found[1]] = keyed[key]
    for module in [module for module in by_module if _is_inner(module, config)]:
        parts.problems += [
            f"tensor '{info.name}' is a factor of a parameter, but 'target_parameters' names none of its module"
            for info in by_module.pop(module).values()
        ]
    has_parameters = False
    for module in sorted({split_inner(module)[0] for module in by_module if _has_parameters(module, config)}):
        nested = {name: by_module.pop(name) for name in list(by_module) if split_inner(name)[0] == module}
        _take_parameters(parts, module, nested, config)
        has_parameters = True
    if config.names_parameters and not has_parameters:
        parts.problems.append(
            "'target_parameters' names parameters of the model, but there are no factors for any of them"
        )
    for module, roles in by_module.items():
        _take_module(parts, module, roles, config)
    if config.keeps_ties("modules_to_save"):
        _take_tied_heads(parts, keyed)
    parts.problems += _changed_twice(parts)
    parts.problems += _without_the_trained(parts)
    if not (parts.deltas or parts.values or parts.rows or parts.experts or parts.problems):
        parts.problems.append("it contains no LoRA factors")
    parts.problems += _wrong_dtypes(tensors)
    if parts.problems:
        rest = len(parts.problems) - SHOWN
        more = f"; and {rest} more" if rest > 0 else ""
        raise AdapterFormatError(f"'{name}': {'; '.join(parts.problems[:SHOWN])}{more}.")
    return Patch(
        name,
        parts.deltas,
        config,
        record,
        base_copies={tensor: tuple(copies) for tensor, copies in sorted(parts.copies.items())},
        values=dict(sorted(parts.values.items())),
        rows=parts.rows,
        bias_deltas=parts.bias_deltas,
        experts=parts.experts,
        revision=revision,
    )


def _plain(parts: _Parts, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors by the keys that PEFT would write for them, without the base's own values beside what was trained."""
    names = adapter_names(tensors)
    if len(names) > 1:
        parts.problems.append(
            f"it contains tensors of {len(names)} adapters ({', '.join(names[:SHOWN])}); save each to its own folder"
        )
        return {}
    keyed: dict[str, TensorInfo] = {}
    for key in sorted(tensors):
        plain = plain_key(key, *names)
        if (tensor := copied_tensor(plain)) is not None:
            parts.copies[tensor].append(tensors[key])
        elif plain not in keyed:
            keyed[plain] = tensors[key]
        elif is_saved(key) != is_saved(keyed[plain].name):
            # PEFT writes both where the vocabulary was resized; the other one is a second copy, of either value.
            saved, other = (tensors[key], keyed[plain]) if is_saved(key) else (keyed[plain], tensors[key])
            keyed[plain] = saved
            parts.copies[plain.removeprefix(PREFIX)].append(other)
        else:
            parts.problems.append(f"tensor '{key}' is the same as '{keyed[plain].name}' under another name")
    return keyed


def _take_whole(parts: _Parts, tensor: str, info: TensorInfo, config: AdapterConfig) -> None:
    is_tied = is_saved(info.name) and config.keeps_ties("modules_to_save")
    if config.saves(tensor) or is_tied or (config.biases == "all" and tensor.endswith(BIAS)):
        parts.values[tensor] = WholeValue(info)
    elif _may_be_resized(tensor, info):
        parts.copies[tensor].append(info)
    else:
        parts.problems.append(
            f"tensor '{info.name}' is a weight of the model that neither 'modules_to_save' nor 'bias' explains"
        )


def _take_tied_heads(parts: _Parts, keyed: Mapping[str, TensorInfo]) -> None:
    """Take what is stored beside an embedding that is saved, and not named: the head that is tied to it.

    What the head is called is the model's affair; here, it is the one other matrix of that shape.
    """
    shapes = {value.values.shape for value in parts.values.values()}
    for tensor in [tensor for tensor, (first, *_) in parts.copies.items() if first.shape in shapes]:
        info = keyed.get(PREFIX + tensor)
        if info is not None and info in parts.copies[tensor]:
            parts.values[tensor] = WholeValue(info)
            parts.copies[tensor].remove(info)
            if not parts.copies[tensor]:
                del parts.copies[tensor]


def _may_be_resized(tensor: str, info: TensorInfo) -> bool:
    """Whether a tensor that nothing explains may be of an embedding or a head, which PEFT saves with a new vocabulary.

    What they are called is the model's affair, and which of its tensors it is; here, it is a matrix or a bias of no
    layer.
    """
    axes = {WEIGHT: 2, BIAS: 1}.get(f".{tensor.rpartition('.')[2]}")
    return len(info.shape) == axes and not _is_of_layer(tensor) and not is_saved(info.name)


def _is_of_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _take_module(parts: _Parts, module: str, roles: Mapping[Role, TensorInfo], config: AdapterConfig) -> None:
    problems = list(_module_problems(module, roles, config))
    parts.problems += problems
    if problems:
        return
    if Role.BASE_WEIGHT in roles:
        parts.copies[module + WEIGHT].append(roles[Role.BASE_WEIGHT])
    if Role.BASE_BIAS in roles and config.biases == "none":
        parts.copies[module + BIAS].append(roles[Role.BASE_BIAS])
    elif Role.BASE_BIAS in roles:
        if module + BIAS in parts.values:
            parts.problems.append(f"'{module + BIAS}' occurs twice, inside its module and beside it")
        parts.values[module + BIAS] = WholeValue(roles[Role.BASE_BIAS])
    if Role.BIAS_DELTA in roles:
        parts.bias_deltas[module + BIAS] = VectorDelta(roles[Role.BIAS_DELTA], config.scale_of(module))
    if Role.TOKEN_ROWS in roles:
        parts.rows[module + WEIGHT] = RowValues(roles[Role.TOKEN_ROWS], config.token_rows_of(module))
    for first, second in PAIRS:
        if first in roles:
            is_embedding = first is Role.EMBEDDING_A
            parts.deltas[module] = LowRankDelta(
                a=roles[first],
                b=roles[second],
                scale=config.scale_of(module),
                transposed=is_embedding or config.is_transposed,
                magnitude=roles.get(Role.MAGNITUDE),
                is_embedding=is_embedding,
            )


def _has_parameters(module: str, config: AdapterConfig) -> bool:
    """Whether a module's factors belong to parameters of it that are adapted by their own names."""
    module, depth = split_inner(module)
    return depth > 0 or (bool(_parameters(module, config)) and not config.targets([module]))


def _is_inner(module: str, config: AdapterConfig) -> bool:
    """Whether a module is one that PEFT wrapped for the sake of a parameter, though none of it is adapted."""
    module, depth = split_inner(module)
    return depth > 0 and not _parameters(module, config)


def _parameters(module: str, config: AdapterConfig) -> tuple[str, ...]:
    """The parameters of a module that are adapted: the configuration may name one without saying of which module."""
    holds_experts = module.rpartition(".")[2] == EXPERTS
    return tuple(name for name in config.parameters_of(module) if holds_experts != (name == "weight"))


def _take_parameters(
    parts: _Parts, module: str, nested: Mapping[str, Mapping[Role, TensorInfo]], config: AdapterConfig
) -> None:
    """Take the factors of a module's parameters; PEFT wraps these one into the other, the first one innermost."""
    parameters = _parameters(module, config)
    order = parameters if len(parameters) == 1 else order_of(parameters)
    expected = [module + INNER * depth for depth in reversed(range(len(parameters)))]
    if set(nested) != set(expected) or any(set(roles) != {Role.A, Role.B} for roles in nested.values()):
        parts.problems.append(
            f"module '{module}' has factors at {', '.join(sorted(nested))}; 'target_parameters' names "
            f"{', '.join(parameters)} of its parameters, whose factors are at {', '.join(expected)}"
        )
    elif order is None:
        parts.problems.append(
            f"module '{module}' has several adapted parameters ({', '.join(parameters)}); their factors can only "
            "be told apart for experts of the families in docs/families.md"
        )
    else:
        for parameter, key in zip(order, expected, strict=True):
            _take_experts(parts, f"{module}.{parameter}", nested[key], config)


def _take_experts(parts: _Parts, tensor: str, roles: Mapping[Role, TensorInfo], config: AdapterConfig) -> None:
    a, b, rank = roles[Role.A], roles[Role.B], config.rank_of(tensor)
    if config.has_magnitudes or config.has_bias_deltas or config.is_transposed:
        parts.problems.append(
            f"'{tensor}' is a parameter, for which PEFT has no 'use_dora', 'lora_bias' or 'fan_in_fan_out'"
        )
    elif len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank:
        parts.problems.append(
            f"'{tensor}' has factors of shape {a.shape} and {b.shape}, expected (experts * {rank}, in) and "
            f"(out, {rank} * experts)"
        )
    elif a.shape[0] > rank:
        parts.experts[tensor] = ExpertsDelta(a=a, b=b, scale=config.scale_of(tensor), rank=rank)
    elif tensor.endswith(WEIGHT):
        parts.deltas[tensor.removesuffix(WEIGHT)] = LowRankDelta(a=a, b=b, scale=config.scale_of(tensor))
    else:
        parts.problems.append(
            f"'{tensor}' is an adapted single-matrix parameter that is not a weight, which is not supported"
        )


def _module_problems(module: str, roles: Mapping[Role, TensorInfo], config: AdapterConfig) -> Iterator[str]:
    """What is wrong with the tensors of one module."""
    for first, second in PAIRS:
        if (first in roles) != (second in roles):
            there, missing = (first, second) if first in roles else (second, first)
            yield f"module '{module}' has '{there.value[1:]}' but not its partner '{missing.value[1:]}'"
        elif first in roles:
            yield from _factor_problems(module, roles[first], roles[second], config)
    has_factors = Role.A in roles and Role.B in roles
    if has_factors:
        yield from _vector_problems(roles)
    if has_factors and config.has_magnitudes != (Role.MAGNITUDE in roles):
        state = "has" if Role.MAGNITUDE in roles else "lacks"
        yield f"module '{module}' {state} a DoRA magnitude, but 'use_dora' is {config.has_magnitudes}"
    if Role.EMBEDDING_A in roles and (config.has_magnitudes or Role.MAGNITUDE in roles):
        yield f"module '{module}' is an embedding with a DoRA magnitude, which is not supported"
    if has_factors and config.has_bias_deltas != (Role.BIAS_DELTA in roles):
        state = "has" if Role.BIAS_DELTA in roles else "lacks"
        yield f"module '{module}' {state} a bias of lora_B, but 'lora_bias' is {config.has_bias_deltas}"
    if Role.BASE_BIAS in roles and config.biases == "none" and _is_of_layer(module):
        yield f"module '{module}' has a trained bias, but 'bias' is none"
    lonely = {Role.MAGNITUDE, Role.BIAS_DELTA, Role.BASE_BIAS, Role.BASE_WEIGHT} & set(roles)
    if lonely and not has_factors and Role.EMBEDDING_A not in roles:
        yield f"module '{module}' has '{min(role.value for role in lonely)[1:]}' but no factors"
    if Role.TOKEN_ROWS in roles:
        rows, info = config.token_rows_of(module), roles[Role.TOKEN_ROWS]
        if not rows or len(info.shape) != 2 or info.shape[0] != len(rows) or len(set(rows)) != len(rows):
            yield (
                f"module '{module}' has {info.shape} trained token rows, but 'trainable_token_indices' names "
                f"{len(rows)}"
            )


def _factor_problems(module: str, a: TensorInfo, b: TensorInfo, config: AdapterConfig) -> Iterator[str]:
    for info in (a, b):
        if len(info.shape) != 2:
            more = "; factors of a convolution are not supported" if len(info.shape) > 2 else ""
            yield f"tensor '{info.name}' has shape {info.shape}, expected two axes{more}"
            return
    if a.shape[0] != b.shape[1]:
        yield f"module '{module}': lora_A has rank {a.shape[0]}, but lora_B has rank {b.shape[1]}"
    elif a.shape[0] != config.rank_of(module):
        yield (
            f"module '{module}': its tensors have rank {a.shape[0]}, but adapter_config.json says "
            f"{config.rank_of(module)}, so its scale is unknown"
        )


def _vector_problems(roles: Mapping[Role, TensorInfo]) -> Iterator[str]:
    """What belongs to the outputs of a module has as many numbers as `lora_B` has rows."""
    for role in (Role.MAGNITUDE, Role.BIAS_DELTA):
        if role in roles and roles[role].shape != roles[Role.B].shape[:1]:
            yield f"tensor '{roles[role].name}' has shape {roles[role].shape}, expected {roles[Role.B].shape[:1]}"


def _changed_twice(parts: _Parts) -> Iterator[str]:
    """Tensors that one part of the file replaces and another one changes."""
    kinds = (
        {module + WEIGHT: "factors" for module in parts.deltas},
        dict.fromkeys(parts.values, "a full value"),
        dict.fromkeys(parts.rows, "trained rows"),
        dict.fromkeys(parts.bias_deltas, "a bias of lora_B"),
    )
    for name in sorted(set().union(*kinds)):
        found = [kind[name] for kind in kinds if name in kind]
        if len(found) > 1:
            yield f"'{name}' has {' and '.join(found)}, of which PEFT would load only one"


def _without_the_trained(parts: _Parts) -> Iterator[str]:
    """The base's own values beside which the trained ones are missing."""
    for tensor, copies in parts.copies.items():
        for info in copies:
            if is_original(info.name) and tensor not in parts.values:
                yield f"tensor '{info.name}' is the base's own value, and the trained one is missing beside it"


def _wrong_dtypes(tensors: Mapping[str, TensorInfo]) -> list[str]:
    return [
        f"tensor '{key}' has dtype {info.dtype}, expected one of {', '.join(FLOAT_DTYPES)}"
        for key, info in sorted(tensors.items())
        if info.dtype not in FLOAT_DTYPES
    ]
