"""Which modules of a layer write to the residual stream, and through what: found out on the layer itself.

Every linear module whose output is as wide as the residual stream may be one. With all of them silent, a layer must
give back what it was given; with one of them saying something known, what is added to the stream is that, times a
number, or what a norm of the layer makes of it. What is neither is refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from portllm.arrays import Float32
from portllm.errors import CheckpointError
from portllm.foreign import Conv1D
from portllm.running.layers import Arguments, LayeredModel

TOLERANCE = 1e-4
"""Of what a layer adds, in float32, where a module's output passes through a norm or a factor."""

Output = Callable[[str, nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]
"""What a hook makes of the name of a module, the module, its inputs and its output: another output, or None."""

Extras = Mapping[str, tuple[Tensor, Tensor]]
"""By writer, what is added to its output beside what its weights make: a and b of `b a x`."""


class _EnoughError(BaseException):
    """Ends a pass through a layer behind the module that was looked at."""


@dataclass(frozen=True, slots=True)
class Writer:
    """A module that writes to the residual stream.

    Attributes:
        name: Its name in the model.
        scale: What its output is multiplied by on its way.
        gain: Weight g of a norm behind it, which adds `g · y / rms(y)` for its output y; None where there is none.
    """

    name: str
    scale: float = 1.0
    gain: Float32[Tensor, " width"] | None = None

    def added(self, output: Float32[Tensor, "... width"]) -> Float32[Tensor, "... width"]:
        """What it adds to the residual stream."""
        if self.gain is None:
            return output * self.scale
        return self.gain * output / output.pow(2).mean(dim=-1, keepdim=True).sqrt()

    def error(
        self, missing: Float32[Tensor, "tokens width"], output: Float32[Tensor, "tokens width"]
    ) -> tuple[Float32[Tensor, "tokens width"], Float32[Tensor, " tokens"]]:
        """What its output lacks for the stream to have what is wanted, and what each token counts for that.

        A norm behind it keeps the direction of its output alone: it need be no longer than it is, and an error of a
        short output weighs more.

        Args:
            missing: The state wanted behind the writer, less the stream before what it adds.
            output: What it says now.
        """
        if self.gain is None:
            return missing / self.scale - output, torch.ones_like(output[:, 0])
        rms = output.pow(2).mean(dim=1, keepdim=True).sqrt()
        return rms * missing / self.gain - output, 1 / rms[:, 0].pow(2)


def find_writers(model: LayeredModel, number: int, given: Arguments, *, tokens: int) -> list[Writer]:
    """The writers of a layer that is filled, in the order in which they speak.

    Args:
        model: The model.
        number: The layer.
        given: What the layer is called with for one row.
        tokens: Of that row.

    Raises:
        CheckpointError: Something else writes, or a writer's output goes an unknown way.
    """
    layer, name = model.layers[number], model.names[number]
    device = next(layer.parameters()).device
    state, said = torch.randn(2, 1, tokens, model.width, generator=torch.Generator().manual_seed(number)).to(device)
    order: list[str] = []
    candidates = {
        f"{name}.{inner}": module for inner, module in layer.named_modules() if is_linear(module, model.width)
    }

    def spoken(speaker: str | None) -> Tensor:
        """What the layer adds where one module alone speaks."""

        def output(candidate: str, _: nn.Module, __: tuple[Tensor, ...], ___: Tensor) -> Tensor:
            order.append(candidate)
            return said if candidate == speaker else torch.zeros_like(said)

        with hooked(candidates, output):
            added: Tensor = model.run(number, state, given) - state
        return added

    if spoken(None).abs().max() > TOLERANCE:
        raise CheckpointError(
            f"'{name}': something other than a linear module of the layer writes to the residual stream (experts, "
            "or a norm with a bias), which is not supported."
        )
    writers = {}
    for candidate in dict.fromkeys(order):
        added = spoken(candidate)
        if added.abs().max() > TOLERANCE:
            writers[candidate] = _writer(candidate, said, added)
    return [writers[candidate] for candidate in dict.fromkeys(order) if candidate in writers]


def is_linear(module: nn.Module, width: int) -> bool:
    """Whether a module is linear with an output of a width; GPT-2's Conv1D has its weight the other way round."""
    if isinstance(module, nn.Linear):
        return module.out_features == width
    return isinstance(module, Conv1D) and bool(module.nf == width)


@contextmanager
def hooked(modules: Mapping[str, nn.Module], output: Output) -> Iterator[None]:
    """Inside the block, a function may replace the outputs of modules."""
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(partial(output, name)).remove)
        yield


@torch.no_grad()
def watch(
    model: LayeredModel,
    number: int,
    writers: Sequence[Writer],
    state: Tensor,
    given: Arguments,
    extras: Extras,
    *,
    stop: int | None = None,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Input and output of each writer up to `stop`, and the state behind the layer, or before it where it was left."""
    found: list[tuple[Tensor, Tensor]] = []

    def output(name: str, _: nn.Module, inputs: tuple[Tensor, ...], said: Tensor) -> Tensor:
        if name in extras:
            a, b = extras[name]
            said = said + inputs[0] @ a.T.to(said) @ b.T.to(said)
        found.append((inputs[0], said))
        if len(found) - 1 == stop:
            raise _EnoughError
        return said

    with hooked({writer.name: model.module(number, writer.name) for writer in writers}, output):
        try:
            return found, model.run(number, state, given)
        except _EnoughError:
            return found, state


def _writer(name: str, said: Tensor, added: Tensor) -> Writer:
    scale = float((added * said).sum() / said.pow(2).sum())
    if (added - scale * said).abs().max() <= TOLERANCE * added.abs().max():
        return Writer(name, scale)
    normed = added / (said / said.pow(2).mean(dim=-1, keepdim=True).sqrt())
    gain = normed.flatten(0, -2).median(dim=0).values
    behind = Writer(name, gain=gain)
    if (behind.added(said) - added).abs().max() <= TOLERANCE * added.abs().max():
        return behind
    raise CheckpointError(
        f"'{name}': what it writes reaches the residual stream neither as it is nor through one RMS norm, which is "
        "not supported."
    )
