"""An adapter folder that never was one: the configuration for given ranks, and PEFT's place for whole values.

An adapter that was read keeps its own configuration (see `adapter_folder`). Deltas that were found in two checkpoints,
or combined from several patches, have none; theirs is written here in one form: every module by its full name, scale 1
(alpha = rank), the most frequent rank as `r`, and a pattern of its own for each module of another rank.

PEFT loads whole values in two ways: modules named in `modules_to_save`, and biases under `bias`. It finds the former
by the end of their names, so `norm` would be taken for every `input_layernorm` too; only names for which that cannot
happen are written.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from portllm.checkpoint.model.names import HEAD
from portllm.patch.adapter_keys import PREFIX, Role, parse_key
from portllm.patch.adapter_tensors import BIAS

LEAVES = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class Placed:
    """Where PEFT expects whole values.

    Attributes:
        keys: The tensor's name by the key it is stored under.
        fields: What the configuration says of them.
        left_out: Tensors that PEFT cannot load, with the reason.
    """

    keys: Mapping[str, str]
    fields: Mapping[str, object]
    left_out: Mapping[str, str]


def place_values(
    changed: Collection[str], *, tensors: Collection[str], targets: Collection[str], tied: str | None, head: str = HEAD
) -> Placed:
    """PEFT's keys for tensors that are replaced whole.

    A module that is saved whole brings all its tensors, changed or not. A bias of a module that has a delta, or of one
    whose weight is as it was, goes alone. An embedding that is tied to the head is stored for both.

    Args:
        changed: Names of the tensors whose value differs from the base's.
        tensors: Names of all tensors of the model.
        targets: Modules that have a low-rank delta.
        tied: The embedding whose matrix is the head's too, before and after tuning; None where there is none.
        head: What the head is called.

    Example:
        >>> tensors = ("model.embed_tokens.weight", "h.0.q.weight", "h.0.q.bias", "h.0.norm.weight")
        >>> placed = place_values(tensors[2:], tensors=tensors, targets=["h.0.q"], tied=None)
        >>> for key in placed.keys: print(key)
        base_model.model.h.0.norm.weight
        base_model.model.h.0.q.base_layer.bias
        >>> dict(placed.fields)
        {'bias': 'lora_only', 'modules_to_save': ['h.0.norm']}
    """
    modules = {name.rpartition(".")[0] for name in tensors}
    keys: dict[str, str] = {}
    whole: set[str] = set()
    left_out: dict[str, str] = {}
    bias = "none"
    ensure_tying = False
    for name in sorted(changed):
        module, _, leaf = name.rpartition(".")
        if module in targets and leaf == "bias":
            keys[f"{PREFIX}{module}.base_layer.bias"] = name
            bias = "lora_only" if bias == "none" else bias
        elif leaf == "bias" and f"{module}.weight" in tensors and f"{module}.weight" not in changed and module:
            keys[PREFIX + name] = name
            bias = "all"
        elif reason := _why_not(module, leaf, modules, targets):
            left_out[name] = reason
        else:
            whole.add(module)
            keys |= {f"{PREFIX}{module}.{part}": f"{module}.{part}" for part in LEAVES if f"{module}.{part}" in tensors}
            if name == tied:
                keys[PREFIX + head] = name
                ensure_tying = True
    fields: dict[str, object] = {}
    if bias != "none":
        fields["bias"] = bias
    if ensure_tying:
        fields["ensure_weight_tying"] = True
    if whole:
        fields["modules_to_save"] = sorted(whole)
    return Placed(dict(sorted(keys.items())), fields, left_out)


def _why_not(module: str, leaf: str, modules: Collection[str], targets: Collection[str]) -> str | None:
    """Why PEFT cannot load a tensor whole, or None."""
    if leaf not in LEAVES or not module:
        return f"PEFT only loads the weight and bias of saved modules, and this is neither ('{leaf}')"
    if module in targets:
        return "PEFT cannot replace a weight that has a low-rank delta"
    mixed = next((other for other in sorted(modules) if other != module and other.endswith(module)), None)
    if mixed:
        return f"PEFT would confuse it with '{mixed}', whose name has the same suffix"
    inner = next((target for target in sorted(targets) if target.startswith(f"{module}.")), None)
    return f"PEFT would ignore the delta of '{inner}' inside it" if inner else None


def canonical_config(
    ranks: Mapping[str, int],
    *,
    parameters: Mapping[str, int] | None = None,
    fields: Mapping[str, object] | None = None,
) -> dict[str, object]:
    r"""The content of `adapter_config.json` for deltas of scale 1.

    Args:
        ranks: By module.
        parameters: Ranks of parameters that are adapted by their own names, by tensor.
        fields: What else it says, such as the fields of `place_values`.

    Example:
        >>> config = canonical_config({"h.0.q": 4, "h.1.q": 4, "h.1.k": 2})
        >>> config["r"], config["lora_alpha"], config["rank_pattern"]
        (4, 4, {'^h\\.1\\.k': 2})
    """
    named = {**ranks, **(parameters or {})}
    counts = Counter(named.values())
    usual = min(counts, key=lambda rank: (-counts[rank], rank))
    others = {"^" + re.escape(module): rank for module, rank in sorted(named.items()) if rank != usual}
    return {
        "alpha_pattern": others,
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": dict(others),
        "target_modules": sorted(ranks),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        **(fields or {}),
    }


def stored_name(key: str) -> str:
    """The tensor of the model that a key of `Placed` holds the value of.

    Example:
        >>> stored_name("base_model.model.h.0.q.base_layer.bias"), stored_name("base_model.model.lm_head.weight")
        ('h.0.q.bias', 'lm_head.weight')
    """
    found = parse_key(key)
    if found is None:
        raise ValueError(f"'{key}' is no key of an adapter")
    module, role = found
    return module + BIAS if role is Role.BASE_BIAS else module
