"""Can an adapter that began with a part of its base's weights be converted? From headers; every reason why not."""

from collections.abc import Iterator

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import same_bytes
from portllm.errors import Refusal
from portllm.matching.changes import oriented
from portllm.patch.adapter_folder import why_unconverted
from portllm.patch.adapter_start import RECOMPUTED_INITS, named_init
from portllm.patch.nothing import has_values
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo

OPTION = "--initial"


def needs_conversion(adapter: Patch[TensorInfo], initial: Patch[TensorInfo] | None) -> bool:
    """Whether an adapter has to be converted before it belongs to its base."""
    return initial is not None or adapter.config.changed_base is not None


def unconvertible(adapter: Patch[TensorInfo], base: Checkpoint, initial: Patch[TensorInfo] | None) -> Iterator[Refusal]:
    """Why an adapter cannot be converted; nothing for one that need not be."""
    if not needs_conversion(adapter, initial):
        return
    began = adapter.config.changed_base
    for name in adapter.experts:
        yield Refusal(
            name,
            "it is a parameter, and PEFT never initializes those from the base's weights. Was the adapter edited by "
            "hand?",
        )
    if base.tied_embedding is not None:
        for module, delta in adapter.deltas.items():
            if base.current_name(module) == base.head_module or delta.is_embedding:
                yield Refusal(
                    module,
                    f"head and embedding of {base.name} are tied: when PEFT subtracted a part from one, it "
                    "subtracted it from the other too, and the adapter does not restore it there. The adapter "
                    "cannot become a patch of this base.",
                )
    if initial is not None:
        yield from _not_its_beginning(adapter, initial)
    elif began not in RECOMPUTED_INITS or named_init(adapter.config.fields) != began:
        yield Refusal(OPTION, f"{adapter.name}: {why_unconverted(adapter)}")
    elif began == "olora":
        for module, delta in oriented(adapter, base).deltas.items():
            if delta.transposed:
                yield Refusal(
                    module,
                    "its weight is stored as (d_in, d_out), which PEFT's OLoRA ignores: what it subtracts is not "
                    "what the adapter adds back.",
                )


def _not_its_beginning(adapter: Patch[TensorInfo], initial: Patch[TensorInfo]) -> Iterator[Refusal]:
    """Why one adapter cannot be what another one was before training."""
    if adapter.config.changed_base is None and adapter.config.fields.get("init_lora_weights", True) is not True:
        yield Refusal(
            OPTION,
            f"'init_lora_weights' of {adapter.name} is '{named_init(adapter.config.fields)}', which does not "
            "change the base: capture it without --initial.",
        )
    for module in sorted(adapter.deltas.keys() ^ initial.deltas.keys()):
        has, lacks = (adapter, initial) if module in adapter.deltas else (initial, adapter)
        yield Refusal(
            module,
            f"{has.name} adapts it, but {lacks.name} does not. Pass the initial adapter of the same training run.",
        )
    both = adapter.deltas.keys() & initial.deltas.keys()
    for module in sorted(both):
        now, then = adapter.deltas[module], initial.deltas[module]
        if (now.rank, now.shape, now.scale) != (then.rank, then.shape, then.scale):
            yield Refusal(
                module,
                f"rank, shape and scale are {now.rank}, {now.shape}, {now.scale:g} in {adapter.name} and "
                f"{then.rank}, {then.shape}, {then.scale:g} in {initial.name}. Pass the initial adapter of the "
                "same training run.",
            )
    if both and all(
        same_bytes(adapter.deltas[module].a, initial.deltas[module].a)
        and same_bytes(adapter.deltas[module].b, initial.deltas[module].b)
        for module in both
    ):
        yield Refusal(
            OPTION,
            f"{initial.name} has the same factors as {adapter.name}: it was not trained, or one is a copy of the "
            "other.",
        )
    elif both and not any(has_values(initial.deltas[module].b) for module in both):
        yield Refusal(
            OPTION,
            f"B is zero in all of {initial.name}, so nothing was subtracted from the base: capture {adapter.name} "
            "without --initial.",
        )
