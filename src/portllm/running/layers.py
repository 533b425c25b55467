"""A causal language model of which one layer at a time is in memory, run by transformers' own modules.

The model is built without weights. What its forward pass gives a layer beside the residual stream (masks, positions,
frequencies) is taken from that very pass, with the layers replaced by what notes their arguments; a layer is then
filled, run on states that lie elsewhere, and emptied. So nothing here knows an architecture: what is no plain stack of
layers around one residual stream is found out by running it on two tokens, and refused.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from portllm.arrays import Float32, Int64
from portllm.errors import CheckpointError
from portllm.foreign import Conv1D, foreign
from portllm.running.encoding import PaddedBatch
from portllm.running.model import PeftModel, PreTrainedModel, build_skeleton

State = Float32[Tensor, "rows tokens width"]
Visit = Callable[[int, Tensor, "Arguments"], Tensor]

HEAD_BLOCK = 4096
"""Rows of a head in memory at a time."""


@runtime_checkable
class Weights(Protocol):
    """Where the values of a model come from, by the names that its parameters have."""

    def tensor(self, name: str) -> Float32[Tensor, "..."] | None:
        """A whole tensor; None where there is none."""

    def rows(self, name: str, rows: Sequence[int]) -> Float32[Tensor, "rows _"]:
        """Some rows of a matrix, in this order."""

    def n_rows(self, name: str) -> int:
        """How many rows a matrix has."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a layer is called with beside the residual stream."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    def replaced(self, old: object, new: object) -> "Arguments":
        """With another object in the place of one."""
        return Arguments(
            tuple(new if value is old else value for value in self.args),
            {name: new if value is old else value for name, value in self.kwargs.items()},
        )


@dataclass(frozen=True, slots=True)
class NewTokens:
    """The newest tokens of rows whose tokens before are in a cache.

    Attributes:
        mask: Of all tokens of each row, as in `PaddedBatch`.
        positions: Of the newest.
    """

    mask: Int64[Tensor, "rows all_tokens"]
    positions: Int64[Tensor, "rows tokens"]


Batch = PaddedBatch | NewTokens


class _Noted:
    """A visit that notes what each layer is called with, and gives back the state that it was given, or a new one."""

    def __init__(self, *, renewed: bool = False) -> None:
        self.states: list[Tensor] = []
        self.arguments: list[Arguments] = []
        self._given: list[Tensor] = []
        self._renewed = renewed

    def __call__(self, _number: int, state: Tensor, arguments: Arguments) -> Tensor:
        self.states.append(state)
        self.arguments.append(arguments)
        self._given.append(state.clone() if self._renewed else state)
        return self._given[-1]

    @property
    def is_passed_on(self) -> bool:
        """Whether each layer was given the very tensor that the one before gave."""
        return all(map(operator.is_, self.states[1:], self._given))


class _Decoded:
    """What a decoder returns, with the last states alone; all else that a model may look for in it is None."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, _name: str) -> None:
        return None

    def __getitem__(self, place: int) -> Tensor | None:
        return self.last_hidden_state if place == 0 else None


class LayeredModel:
    """A model whose layers are filled one at a time.

    Attributes:
        layers: Its layers, in order.
        names: The name of each.
        width: Of the residual stream.
        device: Where layers run.

    Args:
        folder: Its checkpoint, for the configuration.
        weights: Where values come from.
        device: Where layers run.
        longest: Tokens of the longest input that it will be given.

    Raises:
        CheckpointError: transformers has no such model, a tensor is missing, or its layers are no plain stack.
    """

    def __init__(self, folder: Path, weights: Weights, *, device: torch.device, longest: int) -> None:
        self._folder, self._weights, self.device = folder, weights, device
        self._model = build_skeleton(folder, longest=longest)
        self._decoder: Any = self._model.get_decoder()
        self.layers = decoder_layers(self._model)
        if not self.layers:
            raise self._refused("its decoder does not keep its layers in one list")
        names = {id(module): name for name, module in self._model.named_modules()}
        self.names = [names[id(layer)] for layer in self.layers]
        self._embedding: Any = self._model.get_input_embeddings()
        self._head: Any = self._model.get_output_embeddings()
        if self._embedding is None or self._head is None:
            raise self._refused("it has no embedding or no output head")
        self._embedding_name, self._head_name = names[id(self._embedding)], names[id(self._head)]
        self._embedding.padding_idx = None  # means nothing without training, and may lie outside of some rows
        self.width = int(self._embedding.weight.shape[1])
        for module in self._model.modules():
            for leaf, buffer in module._buffers.items():
                module._buffers[leaf] = None if buffer is None else buffer.to(device)
        within = {id(part) for layer in self.layers for part in layer.modules()}
        for name, module in self._model.named_modules():
            if id(module) not in within and module not in (self._embedding, self._head):
                self._fill(module, name)
        self._in_tuples = False
        self._find_form()

    @property
    def n_vocabulary(self) -> int:
        """Rows of the head."""
        return self._weights.n_rows(f"{self._head_name}.weight")

    def module(self, number: int, name: str) -> nn.Module:
        """A module inside a layer, by its name in the model."""
        return self.layers[number].get_submodule(name.removeprefix(f"{self.names[number]}."))

    def weight(self, name: str) -> Float32[Tensor, "d_out d_in"]:
        """The weights of a linear module inside a layer, by its name in the model, whether or not it is filled.

        Raises:
            CheckpointError: The checkpoint lacks them.
        """
        weight = self._weights.tensor(f"{name}.weight")
        if weight is None:
            raise self._refused(f"it has no '{name}.weight'")
        return weight.T if isinstance(self._model.get_submodule(name), Conv1D) else weight

    def embed(self, ids: Int64[Tensor, " tokens"]) -> Float32[Tensor, "tokens width"]:
        """What the embedding gives for tokens; only the rows of these are read."""
        there, places = torch.unique(ids, return_inverse=True)
        rows = self._weights.rows(f"{self._embedding_name}.weight", there.tolist())
        with _filled(self._embedding, {"weight": rows.to(self.device)}), torch.no_grad():
            embedded: Tensor = self._embedding(places.to(self.device))
        return embedded

    def begin(self, batch: Batch, embedded: State, *, cache: object | None = None) -> State:
        """The residual stream before the first layer; with a cache, of tokens behind those that it knows of."""
        noted = _Noted()
        self._through(embedded, batch, noted, cache=cache)
        return noted.states[0]

    def arguments(self, batch: Batch, *, cache: object | None = None) -> list[Arguments]:
        """What each layer is called with for a batch."""
        noted = _Noted()
        rows, tokens = batch.positions.shape
        nothing = torch.zeros(1, 1, self.width, device=self.device).expand(rows, tokens, self.width)
        self._through(nothing, batch, noted, cache=cache)
        return noted.arguments

    @contextmanager
    def filled(self, number: int) -> Iterator[nn.Module]:
        """A layer with its weights, for as long as the block lasts.

        Raises:
            CheckpointError: The checkpoint lacks a tensor of it.
        """
        layer = self.layers[number]
        empty = [(module, dict(module._parameters)) for module in layer.modules()]
        try:
            for name, module in layer.named_modules(prefix=self.names[number]):
                self._fill(module, name)
            yield layer
        finally:
            for module, parameters in empty:
                module._parameters.update(parameters)

    @torch.no_grad()
    def run(self, number: int, state: State, given: Arguments) -> State:
        """What a layer that is filled makes of the residual stream."""
        with foreign(lambda why: self._refused(f"layer {number} fails: {why}")):
            output = self.layers[number](state, *given.args, **given.kwargs)
        result: Tensor = output if isinstance(output, Tensor) else output[0]
        return result

    def finish(self, states: Float32[Tensor, "n width"]) -> Float32[Tensor, "n width"]:
        """What the head is given for states behind the last layer: after the last norm."""
        last, ends = len(self.layers) - 1, states[:, None].to(self.device)
        one = torch.ones(len(states), 1, dtype=torch.int64, device=self.device)
        output = self._through(
            torch.zeros_like(ends), PaddedBatch(one * 0, one, one * 0), lambda n, state, _: ends if n == last else state
        )
        return output[:, 0]

    def logits(self, states: Float32[Tensor, "n width"]) -> Float32[Tensor, "n vocabulary"]:
        """All logits of states behind the last layer."""
        finished = self.finish(states)
        found = torch.empty(len(states), self.n_vocabulary, device=self.device)
        for start, stop in self.head_blocks():
            with self.head(range(start, stop)) as logits:
                found[:, start:stop] = logits(finished)
        return found

    def head_blocks(self) -> Iterator[tuple[int, int]]:
        """First and last token of blocks of the vocabulary."""
        n_rows = self.n_vocabulary
        return ((start, min(start + HEAD_BLOCK, n_rows)) for start in range(0, n_rows, HEAD_BLOCK))

    def head_rows(self, rows: Sequence[int]) -> Float32[Tensor, "rows width"]:
        """The head's weights for some tokens."""
        return self._weights.rows(f"{self._head_name}.weight", rows).to(self.device)

    @contextmanager
    def head(self, rows: Sequence[int]) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from what `finish` gives to the logits of some tokens, with all that the model does to these."""
        weights = {"weight": self.head_rows(rows)}
        if self._head.bias is not None:
            bias = self._weights.tensor(f"{self._head_name}.bias")
            if bias is None:
                raise self._refused(f"it has no '{self._head_name}.bias'")
            weights["bias"] = bias[list(rows)].to(self.device)

        @torch.no_grad()
        def logits(finished: Tensor) -> Tensor:
            states = finished[:, None]
            with replaced(self._decoder, "forward", lambda *_, **__: _Decoded(states)):
                output: Tensor = self._model(inputs_embeds=states, use_cache=False).logits
            return output[:, 0].float()

        with _filled(self._head, weights):
            yield logits

    @cached_property
    def gain(self) -> Float32[Tensor, " width"] | None:
        """The weight g of the last norm, where that is `g · r / rms(r)`; None for any other."""
        probe = torch.randn(2, self.width, generator=torch.Generator().manual_seed(0)).to(self.device)
        gain, found = self.finish(torch.ones_like(probe))[0], self.finish(probe)
        expected = gain * probe / probe.pow(2).mean(dim=1, keepdim=True).sqrt()
        return gain if torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(gain.abs().max())) else None

    def _fill(self, module: nn.Module, name: str) -> None:
        """Give a module its own tensors, not those of modules inside it."""
        for leaf, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            tensor = self._weights.tensor(f"{name}.{leaf}")
            if tensor is None or tensor.shape != parameter.shape:
                found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise self._refused(f"'{name}.{leaf}' {found}; its layers need {tuple(parameter.shape)}")
            module._parameters[leaf] = nn.Parameter(tensor.to(self.device), requires_grad=False)
        for leaf in set(module._buffers) - module._non_persistent_buffers_set:
            if (tensor := self._weights.tensor(f"{name}.{leaf}")) is not None:
                module._buffers[leaf] = tensor.to(self.device)

    @torch.no_grad()
    def _through(self, embedded: State, batch: Batch, visit: Visit, *, cache: object | None = None) -> State:
        """The model's own forward pass with a visit in the place of each layer; what comes out behind the last norm."""

        def visited(number: int, *args: object, **kwargs: object) -> object:
            state = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            rest = args[1:] if args else ()
            if not isinstance(state, Tensor):
                raise TypeError("a layer is given no residual stream")
            result = visit(number, state, Arguments(rest, kwargs))
            return (result,) if self._in_tuples else result

        with ExitStack() as stack, foreign(lambda why: self._refused(f"its layers are no plain stack: {why}")):
            for number, layer in enumerate(self.layers):
                stack.enter_context(replaced(layer, "forward", partial(visited, number)))
            output = self._decoder(
                inputs_embeds=embedded,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        result: Tensor = output.last_hidden_state
        return result

    def _find_form(self) -> None:
        """Whether layers give the residual stream bare or in a tuple; and that they are given nothing else of inputs.

        Raises:
            CheckpointError: What one layer gives is not what the next one is given.
        """
        mask = torch.ones(1, 2, dtype=torch.int64, device=self.device)
        batch = PaddedBatch(mask * 0, mask, mask.cumsum(dim=1) - 1)
        probe = torch.randn(1, 2, self.width, generator=torch.Generator().manual_seed(0)).to(self.device)
        for self._in_tuples in (False, True):
            noted = _Noted(renewed=True)
            with contextlib.suppress(CheckpointError):
                self._through(probe, batch, noted)
                if len(noted.states) == len(self.layers) and noted.is_passed_on:
                    break
        else:
            raise self._refused("what one of its layers gives is not what the next one is given")
        once, again = _Noted(), _Noted()
        self._through(probe, batch, once)
        self._through(2 * probe, batch, again)
        if not _equal(once.arguments, again.arguments):
            raise self._refused("its layers are given more of the input than the residual stream")

    def _refused(self, why: str) -> CheckpointError:
        return CheckpointError(f"'{self._folder}': cannot be run layer by layer: {why}.")


def decoder_layers(model: PreTrainedModel | PeftModel) -> list[nn.Module]:
    """The decoder's layers; none where it does not keep them in one list."""
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = (part for part in model.get_decoder().modules() if isinstance(part, nn.ModuleList))
    return next((list(part) for part in lists if len(part) == n_layers), [])


def _equal(one: object, other: object) -> bool:
    """Whether arguments are the same, in whatever they are held."""
    match one, other:
        case Tensor(), Tensor():
            return one.equal(other)
        case Arguments(), Arguments():
            return _equal((one.args, one.kwargs), (other.args, other.kwargs))
        case Mapping(), Mapping():
            return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
        case ((tuple() | list()), (tuple() | list())):
            return len(one) == len(other) and all(map(_equal, one, other))
        case _:
            return one is other or one == other


@contextmanager
def _filled(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    before = dict(module._parameters)
    module._parameters.update({leaf: nn.Parameter(tensor, requires_grad=False) for leaf, tensor in tensors.items()})
    try:
        yield
    finally:
        module._parameters.update(before)


@contextmanager
def replaced(module: Any, name: str, function: Callable[..., object]) -> Iterator[None]:  # noqa: ANN401 (a foreign module)
    """A function in the place of a module's method, for as long as the block lasts."""
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)
