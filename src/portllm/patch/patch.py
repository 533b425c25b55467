"""A patch as a value: deltas by the module they change, PEFT's configuration, and the record of its origin."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic

from portllm.patch.adapter_config import AdapterConfig
from portllm.patch.delta import F, LowRankDelta
from portllm.patch.record import PatchRecord


@dataclass(frozen=True, slots=True)
class Patch(Generic[F]):
    """What fine-tuning added to a base model.

    Attributes:
        name: What the user called it; stands in messages.
        deltas: By module, such as `model.layers.0.self_attn.q_proj`; sorted.
        config: PEFT's configuration, as read.
        record: Where it comes from, or None for an adapter that no one recorded.
    """

    name: str
    deltas: Mapping[str, LowRankDelta[F]]
    config: AdapterConfig
    record: PatchRecord | None

    @property
    def n_params(self) -> int:
        """Numbers in all factors."""
        return sum(delta.n_params for delta in self.deltas.values())
