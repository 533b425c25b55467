"""The base and the evolved model, both without the patch, run in step over the same text: what each module sees there.

A layer of one model at a time is in memory, and what the modules of a layer were given and gave in both. Two kinds of
modules say too little of their own basis, and something else that has it stands for their outputs:

- What writes to the residual stream may hardly ever say anything in most directions. The stream has its basis, and
  something in all of them.
- The outputs of a module with more of them than inputs span no more than its inputs do. They are units (of an MLP, or
  of heads) that a twin can have in another order; their absolute values follow them there, and span all.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from portllm.errors import CheckpointError
from portllm.methods.contract import Pair, Seen
from portllm.porting.reading import Reading
from portllm.progress import Progress
from portllm.running.layers import LayeredModel
from portllm.running.writers import Writer, hooked

TOKENS = 2
"""That are looked at for each input or output of the widest module, evenly out of all that are read, if so many are."""


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
        step = self._step(by_layer)
        for reading in self.readings:
            for name, model in self._models:
                reading.states[name] = reading.spool.room(name, reading.rows.n_tokens, model.width)
                reading.begin(name, model)
        for number, inside in enumerate(by_layer):
            before, after = (self._through(name, model, number, inside, step) for name, model in self._models)
            for module in inside:
                yield Pair(module, before.pop(module), after.pop(module))
            self.progress("transport", number + 1, len(by_layer), "steps")

    @property
    def _models(self) -> tuple[tuple[str, LayeredModel], ...]:
        return ("base", self.base), ("evolved", self.evolved)

    @property
    def _batches(self) -> list[tuple[Reading, list[int]]]:
        return [(reading, batch) for reading in self.readings for batch in reading.to_fit]

    def _step(self, by_layer: Sequence[Sequence[str]]) -> int:
        """From a token that is looked at to the next one."""
        found = (
            model.module(n, name) for _, model in self._models for n, names in enumerate(by_layer) for name in names
        )
        widest = max(size for module in found for size in module.get_parameter("weight").shape)
        n_tokens = sum(len(reading.rows.tokens(batch)) for reading, batch in self._batches)
        return max(1, n_tokens // (TOKENS * widest))

    def _through(
        self, name: str, model: LayeredModel, number: int, modules: Sequence[str], step: int
    ) -> dict[str, Seen]:
        """A model through a layer, with what its modules see there."""
        rows: dict[str, list[tuple[Tensor, ...]]] = {module: [] for module in modules}
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def note(module: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[module] = inputs[0], output

        with model.filled(number), hooked({module: model.module(number, module) for module in modules}, note):
            spoken = self.readings[0].spoken(model, number)
            writers = {each.name for each in spoken if isinstance(each, Writer) and each.gain is None}
            for reading, batch in self._batches:
                state = model.run(number, reading.state(name, batch), reading.arguments(model, number, batch))
                reading.keep(name, batch, state)
                for module, (x, output) in seen.items():
                    y = state if module in writers else output.abs() if output.shape[-1] > x.shape[-1] else output
                    rows[module].append(tuple(reading.flat(side, batch)[::step].cpu() for side in (x, y)))
        return {module: Seen(*(torch.cat(side) for side in zip(*sides, strict=True))) for module, sides in rows.items()}
