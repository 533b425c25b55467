"""Which modules of a layer write to the residual stream, and through what: found out on the layer itself.

A module that does not write, a projection of queries for example, is a reader: what it says stays inside the layer.

Every linear module whose output is as wide as the residual stream may be one. With all of them silent, a layer must
give back what it was given; with one of them saying something known, what is added to the stream is that, times a
number, or what a norm of the layer makes of it. What is neither is refused.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from portllm.arrays import Float32
from portllm.errors import CheckpointError
from portllm.foreign import Conv1D
from portllm.running.layers import Arguments, LayeredModel, replaced

TOLERANCE = 1e-4
"""Of what a layer adds, in float32, where a module's output passes through a norm or a factor."""

SILENT = 1e-6
"""The least root mean square that an output is divided by."""

WEAK = 0.001
"""Of the mean square of a norm's gains: units whose gain squared is below it are hardly made up for."""

Output = Callable[[str, nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]
"""What a hook makes of the name of a module, the module, its inputs and its output: another output, or None."""

Extras = Mapping[str, tuple[Tensor, Tensor]]
"""By module, what is added to its output beside what its weights make: a and b of `b a x`."""


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
        return self.gain * output / _rms(output)

    def wanted(
        self, before: Float32[Tensor, "... width"], output: Float32[Tensor, "... width"]
    ) -> Float32[Tensor, "... width"]:
        """What is wanted of another model in its place: the state behind it."""
        return before + self.added(output)

    def error(
        self,
        wanted: Float32[Tensor, "tokens width"],
        before: Float32[Tensor, "tokens width"],
        output: Float32[Tensor, "tokens width"],
    ) -> tuple[Float32[Tensor, "tokens width"], Float32[Tensor, " tokens"]]:
        """What its output lacks for the stream to have what is wanted, and what each token counts for that.

        A norm behind it keeps the direction of its output alone: it need be no longer than it is, and an error of a
        short output weighs more. What a unit of the stream lacks, m, is made up for by δ with the least
        `(g δ / rms - m)² + ε (δ / rms)²`, ε a share of the mean g²: where the gain g is small or zero, as some of Gemma
        are, making up for all of it would take an output so large that the norm shrank all other units.

        Args:
            wanted: The state wanted behind the writer.
            before: The stream before what it adds.
            output: What it says now.
        """
        missing = wanted - before - self.added(output)
        if self.gain is None:
            return missing / self.scale, torch.ones_like(output[:, 0])
        rms, squares = _rms(output), self.gain.pow(2)
        return rms * missing * self.gain / (squares + WEAK * squares.mean()), 1 / rms[:, 0].pow(2)


@dataclass(frozen=True, slots=True)
class Reader:
    """A linear module of a layer whose output stays inside the layer.

    Attributes:
        name: Its name in the model.
        follows: Whether it is given what the module before it is given, the very tensor.
    """

    name: str
    follows: bool = False

    def added(self, output: Float32[Tensor, "... d_out"]) -> Float32[Tensor, ""]:
        """What it adds to the residual stream: nothing."""
        return output.new_zeros(())

    def wanted(
        self, before: Float32[Tensor, "... width"], output: Float32[Tensor, "... d_out"]
    ) -> Float32[Tensor, "... d_out"]:
        """What is wanted of another model in its place: the same output."""
        del before
        return output

    def error(
        self,
        wanted: Float32[Tensor, "tokens d_out"],
        before: Float32[Tensor, "tokens width"],
        output: Float32[Tensor, "tokens d_out"],
    ) -> tuple[Float32[Tensor, "tokens d_out"], Float32[Tensor, " tokens"]]:
        """What its output lacks, and what each token counts for that."""
        del before
        return wanted - output, torch.ones_like(output[:, 0])


Spoken = Writer | Reader
"""A module that is fitted to what another model says in its place."""


def find_spoken(
    model: LayeredModel, number: int, given: Arguments, *, tokens: int, changed: Collection[str] = ()
) -> list[Spoken]:
    """The writers of a layer that is filled, and the readers that a patch changes, in the order in which they speak.

    A writer is the last: what speaks behind it is not heard.

    Args:
        model: The model.
        number: The layer.
        given: What the layer is called with for one row.
        tokens: Of that row.
        changed: What a patch changes.

    Raises:
        CheckpointError: Something else writes, a writer's output goes an unknown way, or one of them is run again.
    """
    layer, name = model.layers[number], model.names[number]
    device = next(layer.parameters()).device
    state, said = torch.randn(2, 1, tokens, model.width, generator=torch.Generator().manual_seed(number)).to(device)
    order: list[str] = []
    inputs: dict[str, Tensor] = {}
    linear = {f"{name}.{inner}": module for inner, module in layer.named_modules() if width_of(module)}
    candidates = {name for name, module in linear.items() if width_of(module) == model.width}

    def spoken(speaker: str | None) -> Tensor:
        """What the layer adds where one module alone speaks."""

        def output(name: str, _: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> Tensor | None:
            order.append(name)
            inputs.setdefault(name, given[0])
            if name not in candidates:
                return None
            return said if name == speaker else torch.zeros_like(said)

        with hooked(linear, output):
            added: Tensor = model.run(number, state, given) - state
        return added

    if spoken(None).abs().max() > TOLERANCE:
        raise CheckpointError(
            f"'{name}': something other than a linear module of the layer writes to the residual stream (experts, "
            "or a norm with a bias), which is not supported."
        )
    found: dict[str, Spoken] = {}
    before: Tensor | None = None
    for module, times in Counter(order).items():
        added = spoken(module) if module in candidates else torch.zeros(())
        writes = bool(added.abs().max() > TOLERANCE)
        if times > 1 and (writes or module in changed):
            raise CheckpointError(f"'{module}': is run {times} times in its layer, which is not supported.")
        if writes:
            found[module] = _writer(module, said, added)
        elif module in changed:
            found[module] = Reader(module, follows=inputs[module] is before)
        if module in found:
            before = inputs[module]
    last = max((place for place, each in enumerate(found.values()) if isinstance(each, Writer)), default=-1)
    return list(found.values())[: last + 1]


def width_of(module: nn.Module) -> int:
    """Of the output of a linear module, 0 for any other; GPT-2's Conv1D has its weight the other way round."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return int(module.nf) if isinstance(module, Conv1D) else 0


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
    modules: Sequence[Spoken],
    state: Tensor,
    given: Arguments,
    extras: Extras,
    *,
    first: int = 0,
    stop: int | None = None,
    known: Mapping[str, Tensor] | None = None,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Input and output of modules from `first` to `stop`, and the state behind the layer, or before it if it was left.

    Modules whose outputs are known from an earlier pass, with what is added to them, say these and are not run again.
    """
    known = known or {}
    found: list[tuple[Tensor, Tensor]] = []
    order = {each.name: place for place, each in enumerate(modules)}

    def output(name: str, _: nn.Module, inputs: tuple[Tensor, ...], said: Tensor) -> Tensor:
        if name in extras and name not in known:
            a, b = extras[name]
            said = said + inputs[0] @ a.T.to(said) @ b.T.to(said)
        if order[name] >= first:
            found.append((inputs[0], said))
        if order[name] == stop:
            raise _EnoughError
        return said

    by_name = {each.name: model.module(number, each.name) for each in modules}
    with hooked(by_name, output), ExitStack() as stack:
        for name, said in known.items():
            stack.enter_context(replaced(by_name[name], "forward", partial(_say, said)))
        try:
            return found, model.run(number, state, given)
        except _EnoughError:
            return found, state


def _say(said: Tensor, *_: object) -> Tensor:
    return said


def _rms(output: Float32[Tensor, "... width"]) -> Float32[Tensor, "... 1"]:
    """Never zero, since a norm makes zeros of zeros."""
    return output.pow(2).mean(dim=-1, keepdim=True).sqrt().clamp(min=SILENT)


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
