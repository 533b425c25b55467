"""Rows that several models read, batch by batch, with the states of each model that are carried from layer to layer."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from portllm.methods.contract import Part
from portllm.porting.prompts import Rows
from portllm.running.encoding import PaddedBatch, batches, pad_left
from portllm.running.layers import Arguments, LayeredModel
from portllm.running.spool import Spool
from portllm.running.writers import Spoken, find_spoken, watch

FITTED: tuple[Part, ...] = ("fit", "anchor")

KEPT_SCORES = 1 << 18
"""Of a batch: tokens of a row, squared, times rows. Masks of more are made again for every layer."""


@dataclass
class Reading:
    """Some rows that several models read.

    Attributes:
        rows: The rows.
        model: Whose states the candidates are to have: the old specialist, or the bare evolved model.
        changed: Modules that a patch changes.
        device: Where layers run.
        batch_size: Rows of a pass.
        spool: Where lies what is wanted in each module's place.
        last: Its states behind the last layer at the places, where it wrote the rows itself.
    """

    rows: Rows
    model: LayeredModel
    changed: Collection[str]
    device: torch.device
    batch_size: int
    spool: Spool
    last: Tensor | None = None
    states: dict[str | None, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    wanted: list[list[Tensor]] = field(default_factory=list)
    _arguments: dict[tuple[int, tuple[int, ...]], list[Arguments]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.to_fit, self.others = (
            [
                [rows[place] for place in batch]
                for batch in batches([len(self.rows.ids[row]) for row in rows], batch_size=self.batch_size)
            ]
            for rows in (
                [row for row, part in enumerate(self.rows.parts) if part in FITTED],
                [row for row, part in enumerate(self.rows.parts) if part not in FITTED],
            )
        )

    def pad(self, batch: Sequence[int]) -> PaddedBatch:
        """The ids of a batch."""
        return pad_left([self.rows.ids[row] for row in batch], device=self.device)

    def arguments(self, model: LayeredModel, number: int, batch: Sequence[int]) -> Arguments:
        """What a layer of a model is called with for a batch; kept for all layers where it is small."""
        key = id(model), tuple(batch)
        if key in self._arguments:
            return self._arguments[key][number]
        padded = self.pad(batch)
        arguments = model.arguments(padded)
        rows, tokens = padded.ids.shape
        if rows * tokens * tokens <= KEPT_SCORES:
            self._arguments[key] = arguments
        return arguments[number]

    def state(self, name: str | None, batch: Sequence[int]) -> Tensor:
        """The states of a batch, padded."""
        return self.padded(self.states[name][self.rows.tokens(batch)].to(self.device), batch)

    def padded(self, flat: Tensor, batch: Sequence[int]) -> Tensor:
        """The tokens of a batch, given row after row, with zeros before those of shorter rows."""
        lengths = [len(self.rows.ids[row]) for row in batch]
        padded = flat.new_zeros(len(batch), max(lengths), flat.shape[-1])
        for place, row in enumerate(torch.split(flat, lengths)):
            padded[place, padded.shape[1] - len(row) :] = row
        return padded

    def last_states(self, name: str | None) -> Tensor:
        """The states behind the last layer at the places, once all layers have been run."""
        return self.last if name is None and self.last is not None else self.states[name][self.rows.places]

    def keep(self, name: str | None, batch: Sequence[int], state: Tensor) -> None:
        """The states of a batch behind a layer."""
        self.states[name][self.rows.tokens(batch)] = self.flat(state, batch).cpu()

    def flat(self, padded: Tensor, batch: Sequence[int]) -> Tensor:
        """The tokens of a batch without padding, row after row."""
        width = padded.shape[1]
        return torch.cat([padded[place, width - len(self.rows.ids[row]) :] for place, row in enumerate(batch)])

    def begin(self, name: str | None, model: LayeredModel) -> None:
        """The states before the first layer, in the room that there is for them."""
        for batch in (*self.to_fit, *self.others):
            padded = self.pad(batch)
            embedded = model.embed(padded.ids.flatten()).view(*padded.ids.shape, -1)
            self.keep(name, batch, model.begin(padded, embedded))

    def run_wanted(self, number: int, *, is_fitted: bool) -> None:
        """The model to be reached, through a layer that is filled.

        Args:
            number: The layer.
            is_fitted: Whether something is fitted there: what is wanted in each module's place is kept.
        """
        modules = self.spoken(self.model, number)
        self.wanted = [[] for _ in modules]
        for batch in (*(self.to_fit if is_fitted else ()), *(self.others if self.last is None else ())):
            state = self.state(None, batch)
            found, after = watch(self.model, number, modules, state, self.arguments(self.model, number, batch), {})
            self.keep(None, batch, after)
            if batch in self.to_fit:
                for place, (module, (_, output)) in enumerate(zip(modules, found, strict=True)):
                    wanted = self.flat(module.wanted(state, output), batch).cpu()
                    self.wanted[place].append(self.spool.keep((place, batch[0]), wanted))
                    state = state + module.added(output)

    def spoken(self, model: LayeredModel, number: int) -> list[Spoken]:
        """What is fitted of a layer that is filled."""
        probe = pad_left([self.rows.ids[0][:4]], device=model.device)
        given = model.arguments(probe)[number]
        return find_spoken(model, number, given, tokens=probe.ids.shape[1], changed=self.changed)
