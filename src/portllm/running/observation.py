"""What a model makes of prompts, as little of it as will do: its last states and logits, and what deltas read.

Hooks keep, of each module that is asked for, the products `A x` with a few thin matrices at a few tokens of each
prompt; of each layer, the state of the last token; of the output, its logits. Activations live as long as one batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from portllm.arrays import Float, Float32
from portllm.running.encoding import batches, pad_left
from portllm.running.layers import decoder_layers
from portllm.running.model import PeftModel, PreTrainedModel

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen of one model, in the order of the prompts; on the CPU.

    Attributes:
        logits: For the token after each prompt.
        states: What each layer puts out for the last token of each prompt; empty where that was not asked for.
        reads: By module, `A x` of each token that is looked at, for each of its matrices A.
    """

    logits: Float32[Tensor, "prompts vocabulary"]
    states: tuple[Float32[Tensor, "prompts width"], ...]
    reads: Mapping[str, tuple[Float32[Tensor, "tokens _"], ...]]


@torch.no_grad()
def observe(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Ids],
    *,
    device: torch.device,
    batch_size: int,
    factors: Mapping[str, Sequence[Float[Tensor, "_ _"]]] | None = None,
    positions: int = 1,
    states: bool = False,
    tick: Callable[[int], None] = lambda _: None,
) -> Observation:
    """Runs a model once over prompts.

    Args:
        model: In evaluation mode.
        prompts: Ids of each, at least one.
        device: Where the model is.
        batch_size: Prompts of a pass; changes no result by more than rounding.
        factors: By module of the model, the matrices A that read its input. A module that the model lacks, or that is
            not given every token (an expert), is left out of the result.
        positions: Tokens of a prompt at which is read, at most: `spread_positions`.
        states: Keep the state of the last token after each layer.
        tick: Told how many prompts each batch had.
    """
    watch = _Watch(model, prompts, factors or {}, positions=positions, states=states, device=device)
    logits: list[Tensor] = [torch.empty(0)] * len(prompts)
    with watch.on():
        for batch in batches(list(map(len, prompts)), batch_size=batch_size):
            padded = pad_left([prompts[row] for row in batch], device=device)
            watch.look_at(batch, width=padded.ids.shape[1])
            output: Tensor = model(
                input_ids=padded.ids,
                attention_mask=padded.mask,
                position_ids=padded.positions,
                logits_to_keep=1,
                use_cache=False,
            ).logits
            for row, found in zip(batch, output[:, -1].float().cpu(), strict=True):
                logits[row] = found
            tick(len(batch))
    return Observation(torch.stack(logits), tuple(watch.states), watch.reads)


def spread_positions(length: int, most: int) -> list[int]:
    """At most so many places of a text, evenly spaced; its last one is always among them.

    Example:
        >>> spread_positions(10, 3), spread_positions(2, 3)
        ([3, 6, 9], [0, 1])
    """
    count = min(length, most)
    step = length // count
    return [length - 1 - step * number for number in reversed(range(count))]


class _Watch:
    """Hooks on a model, and what they have kept."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        prompts: Sequence[Ids],
        factors: Mapping[str, Sequence[Float[Tensor, "_ _"]]],
        *,
        positions: int,
        states: bool,
        device: torch.device,
    ) -> None:
        self._lengths = list(map(len, prompts))
        self._places = [spread_positions(length, positions) for length in self._lengths]
        counts = torch.tensor([len(places) for places in self._places])
        self._starts = (counts.cumsum(0) - counts).tolist()
        self._n_tokens = int(counts.sum().item())
        modules = dict(model.named_modules())
        self._read = {
            name: (modules[name], [a.to(device, torch.float32) for a in matrices])
            for name, matrices in factors.items()
            if name in modules
        }
        self._layers = decoder_layers(model) if states else []
        self._kept: dict[str, tuple[Tensor, ...]] = {}
        self._uneven: set[str] = set()
        self.states: list[Tensor] = []
        self._batch: list[int] = []
        self._width = 0
        self._rows = self._columns = self._targets = torch.empty(0, dtype=torch.int64)

    @property
    def reads(self) -> dict[str, tuple[Tensor, ...]]:
        """What was kept of the modules that saw every token."""
        return {name: kept for name, kept in self._kept.items() if name not in self._uneven}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Hooks are on the model inside the block."""
        with ExitStack() as stack:
            for name, (module, _) in self._read.items():
                stack.callback(module.register_forward_pre_hook(partial(self._on_input, name)).remove)
            for number, layer in enumerate(self._layers):
                stack.callback(layer.register_forward_hook(partial(self._on_state, number)).remove)
            yield

    def look_at(self, batch: list[int], *, width: int) -> None:
        """The prompts of the next pass, which end in the last of so many columns."""
        self._batch, self._width = batch, width
        seen = [
            (number, width - self._lengths[row] + place, self._starts[row] + index)
            for number, row in enumerate(batch)
            for index, place in enumerate(self._places[row])
        ]
        self._rows, self._columns, self._targets = torch.tensor(seen, dtype=torch.int64).unbind(dim=1)

    def _on_input(self, name: str, _module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x, rows, columns, targets = inputs[0], self._rows, self._columns, self._targets
        if x.ndim == 2 and len(x) == len(self._batch) * self._width:
            x = x.view(len(self._batch), self._width, -1)
        if x.ndim != 3 or len(x) != len(self._batch):
            self._uneven.add(name)
            return
        # The head is given the last columns alone.
        columns = columns - (self._width - x.shape[1])
        here = columns >= 0
        picked = x[rows[here].to(x.device), columns[here].to(x.device)].float()
        _, matrices = self._read[name]
        if name not in self._kept:
            self._kept[name] = tuple(torch.zeros(self._n_tokens, len(a)) for a in matrices)
        for kept, a in zip(self._kept[name], matrices, strict=True):
            kept[targets[here]] = (picked @ a.T).cpu()

    def _on_state(
        self, number: int, _module: torch.nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]
    ) -> None:
        state = (output if isinstance(output, Tensor) else output[0])[:, -1].float().cpu()
        if number == len(self.states):
            self.states.append(torch.zeros(len(self._lengths), state.shape[-1]))
        self.states[number][self._batch] = state
