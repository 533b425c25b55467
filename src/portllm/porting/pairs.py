"""The base and the evolved model, both without the patch, run in step over the same text: what each module sees there.

A layer of one model at a time is in memory, and what the modules of a layer were given and gave in both.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from portllm.errors import CheckpointError
from portllm.methods.contract import Pair, Seen
from portllm.porting.reading import Reading
from portllm.progress import Progress
from portllm.running.layers import LayeredModel
from portllm.running.writers import hooked

MOST_TOKENS = 8192
"""That are looked at, evenly out of all that are read."""


@dataclass
class Pairs:
    """Two models over the same rows.

    Attributes:
        base: The one.
        evolved: The other.
        readings: The rows, of which those to fit on are read.
        progress: Told of the layers done.
    """

    base: LayeredModel
    evolved: LayeredModel
    readings: Sequence[Reading]
    progress: Progress

    def over(self, modules: Collection[str]) -> Iterator[Pair]:
        """Some modules, layer by layer.

        Raises:
            CheckpointError: One of them is in no layer.
        """
        by_layer = [[module for module in modules if module.startswith(f"{name}.")] for name in self.base.names]
        if lost := set(modules).difference(*by_layer):
            raise CheckpointError(f"'{min(lost)}': lies outside of the model's layers, where nothing is compared.")
        for reading in self.readings:
            for name, model in self._models:
                reading.states[name] = torch.empty(reading.rows.n_tokens, model.width)
                reading.begin(name, model)
        for number, inside in enumerate(by_layer):
            before, after = (self._through(name, model, number, inside) for name, model in self._models)
            for module in inside:
                yield Pair(module, before.pop(module), after.pop(module))
            self.progress("transport", number + 1, len(by_layer), "steps")

    @property
    def _models(self) -> tuple[tuple[str, LayeredModel], ...]:
        return ("base", self.base), ("evolved", self.evolved)

    def _through(self, name: str, model: LayeredModel, number: int, modules: Sequence[str]) -> dict[str, Seen]:
        """A model through a layer, with what its modules see there."""
        rows: dict[str, list[tuple[Tensor, Tensor]]] = {module: [] for module in modules}
        step = math.ceil(
            sum(len(reading.rows.tokens(b)) for reading in self.readings for b in reading.to_fit) / MOST_TOKENS
        )
        with model.filled(number):
            found = {module: model.module(number, module) for module in modules}
            for reading in self.readings:
                for batch in reading.to_fit:

                    def note(
                        module: str,
                        _: nn.Module,
                        inputs: tuple[Tensor, ...],
                        output: Tensor,
                        reading: Reading = reading,
                        batch: Sequence[int] = batch,
                    ) -> None:
                        x, y = (reading.flat(each, batch)[::step].cpu() for each in (inputs[0], output))
                        rows[module].append((x, y))

                    with hooked(found, note):
                        state = model.run(number, reading.state(name, batch), reading.arguments(model, number, batch))
                    reading.keep(name, batch, state)
        return {module: Seen(*(torch.cat(side) for side in zip(*pairs, strict=True))) for module, pairs in rows.items()}
