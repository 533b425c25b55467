"""The patch value: deltas by module, PEFT's configuration, and the record of its origin."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from portllm.files.source import LocalFile
from portllm.patch.adapter_config import AdapterConfig
from portllm.patch.delta import ExpertsDelta, F, Factor, LowRankDelta, RowValues, VectorDelta, WholeValue
from portllm.patch.record import PatchRecord

G = TypeVar("G", bound=Factor)


@dataclass(frozen=True, slots=True)
class Patch(Generic[F]):
    """A patch: what fine-tuning added to a base model.

    Attributes:
        name: Its name in messages, as given by the user.
        deltas: By module, such as `model.layers.0.self_attn.q_proj`; sorted.
        config: PEFT's configuration, as read.
        record: Its origin, or None for an adapter without `patch.json`.
        base_copies: By tensor, what PEFT stores of the base's own weights: under the factors of an adapter of the head,
            beside what is saved whole, and wherever the vocabulary was resized. They are held against the base before
            the patch is used, and are no part of what is written; see `portllm.matching.base_copies`.
        values: By tensor, the tuned model's value, where it stands whole in the place of the base's.
        rows: By tensor, the tuned model's value of some rows of an embedding.
        bias_deltas: By tensor, what is added to a bias.
        experts: By tensor, what is added to the weight of all experts of a layer.
        revision: The commit hash of an adapter of the Hugging Face Hub, else None.
        beside: Tokenizer and chat template saved with it, by name.
        labels: Names of the labels of a classifier, where a `config.json` beside the adapter or the record says them.
        resized: By tensor, the weight of a base with added tokens, where that has more rows than the base's; its first
            rows are the base's.
        card: The model card in its folder.
    """

    name: str
    deltas: Mapping[str, LowRankDelta[F]]
    config: AdapterConfig
    record: PatchRecord | None
    base_copies: Mapping[str, tuple[F, ...]] = field(default_factory=dict)
    values: Mapping[str, WholeValue[F]] = field(default_factory=dict)
    rows: Mapping[str, RowValues[F]] = field(default_factory=dict)
    bias_deltas: Mapping[str, VectorDelta[F]] = field(default_factory=dict)
    experts: Mapping[str, ExpertsDelta[F]] = field(default_factory=dict)
    revision: str | None = None
    beside: Mapping[str, LocalFile] = field(default_factory=dict)
    resized: Mapping[str, F] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    card: LocalFile | None = None

    def __repr__(self) -> str:
        base = f", base={self.record.base.name!r}" if self.record else ""
        return f"Patch({self.name!r}, {len(self.deltas) + len(self.experts)} modules, {self.n_params:,} numbers{base})"

    @property
    def is_plain_lora(self) -> bool:
        """Whether it is made of LoRA deltas alone."""
        if self.values or self.rows or self.bias_deltas or self.experts:
            return False
        return all(delta.magnitude is None for delta in self.deltas.values())

    def mapped(self, change: Callable[[F], G]) -> "Patch[G]":
        """The same patch with a function applied to each of its tensors."""
        return Patch(
            self.name,
            {
                module: LowRankDelta(
                    change(delta.a),
                    change(delta.b),
                    delta.scale,
                    delta.transposed,
                    None if delta.magnitude is None else change(delta.magnitude),
                    delta.is_embedding,
                )
                for module, delta in self.deltas.items()
            },
            self.config,
            self.record,
            {tensor: tuple(map(change, copies)) for tensor, copies in self.base_copies.items()},
            {tensor: WholeValue(change(value.values)) for tensor, value in self.values.items()},
            {tensor: RowValues(change(rows.values), rows.rows) for tensor, rows in self.rows.items()},
            {tensor: VectorDelta(change(bias.values), bias.scale) for tensor, bias in self.bias_deltas.items()},
            {
                tensor: ExpertsDelta(change(e.a), change(e.b), e.scale, e.rank, e.transposed)
                for tensor, e in self.experts.items()
            },
            self.revision,
            self.beside,
            {tensor: change(weight) for tensor, weight in self.resized.items()},
            self.labels,
            self.card,
        )

    @property
    def n_params(self) -> int:
        """Number of elements of all factors, magnitudes and full values."""
        whole = [value.values.shape for value in self.values.values()]
        whole += [value.values.shape for value in self.rows.values()]
        whole += [value.values.shape for value in self.bias_deltas.values()]
        low_rank = [delta.n_params for delta in self.deltas.values()]
        low_rank += [delta.n_params for delta in self.experts.values()]
        return sum(low_rank) + sum(map(math.prod, whole))

    @property
    def is_relative(self) -> bool:
        """Whether all of it is added to the base, so that it can be ported without reading weights."""
        return not (
            self.values
            or self.rows
            or self.resized
            or any(delta.magnitude is not None for delta in self.deltas.values())
        )
