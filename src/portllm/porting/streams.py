"""The old specialist and what is ported of it, run in step over the same prompts, layer by layer from disk."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from portllm.methods.contract import Block, Comparison, Part
from portllm.porting.prompts import Rows
from portllm.progress import Progress
from portllm.running.encoding import PaddedBatch, batches, pad_left
from portllm.running.layers import LayeredModel
from portllm.running.writers import Writer, find_writers, hooked

OLD = "old"


class _EnoughError(BaseException):
    """Ends a pass through a layer behind the module that was looked at."""


@dataclass
class Extra:
    """What a candidate has at a writer beside what was added: `b a`, in the layout of a LoRA."""

    a: Float32[Tensor, "r d_in"]
    b: Float32[Tensor, "d_out r"]


@dataclass
class WriterStep:
    """A writer that the streams have come to; see `portllm.methods.contract.Writer`."""

    streams: "Streams"
    number: int
    place: int
    module: str

    def blocks(self, candidate: str) -> Iterator[Block]:
        """As the contract says."""
        return self.streams.blocks(self, candidate)

    def put(self, candidate: str, a: Tensor, b: Tensor) -> None:
        """As the contract says."""
        self.streams.extras.setdefault(candidate, {})[self.module] = Extra(a.float(), b.float())


@dataclass
class Streams:
    """Two models over the same rows; see `portllm.methods.contract.Streams`.

    Attributes:
        old: The base with its patch.
        new: The evolved model with the patch added.
        rows: What they read.
        folder: Where states lie.
        batch_size: Rows of a pass.
        device: Where layers run.
        omega: What a token of a prompt counts, beside one with a token of an answer after it.
        progress: Told of the layers done.
        extras: By candidate and module, what was put.
    """

    old: LayeredModel
    new: LayeredModel
    rows: Rows
    folder: Path
    batch_size: int
    omega: float
    device: torch.device
    progress: Progress
    extras: dict[str, dict[str, Extra]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._batches = {
            is_fit: self._batched(self.rows.of(*parts))
            for is_fit, parts in ((True, ("fit",)), (False, ("choose", "report")))
        }
        self._states: dict[str, Tensor] = {}
        self._targets: list[Tensor] = []
        self._writers: list[Writer] = []
        self._inputs: dict[str, Tensor] = {}
        self._likely: Tensor | None = None

    # -- walking ------------------------------------------------------------------------------------------------------

    def walk(self, candidates: Sequence[str]) -> Iterator[WriterStep]:
        """As the contract says."""
        for name in (OLD, *candidates):
            self._begin(name)
        n_layers = len(self.new.layers)
        for number in range(n_layers):
            with self.old.filled(number), self.new.filled(number):
                self._writers = self._find(self.new, number)
                self._run_old(number)
                for place, writer in enumerate(self._writers):
                    yield WriterStep(self, number, place, writer.name)
                for candidate in candidates:
                    self._run(number, candidate)
            self.progress("align", number + 1, n_layers, "steps")

    def blocks(self, step: WriterStep, candidate: str) -> Iterator[Block]:
        """What a candidate gives a writer, and what it lacks of the old specialist behind it; rows to fit on."""
        target = self._targets[step.place]
        seen = 0
        for batch in self._batches[True]:
            state = self._padded(candidate, batch)
            found = self._watch(self.new, self._writers, step.number, candidate, batch, state, stop=step.place)
            x, y = found[step.place]
            before = state + sum(
                (writer.added(found[place][1]) for place, writer in enumerate(self._writers[: step.place])),
                torch.zeros_like(state),
            )
            count = len(self.rows.tokens(batch))
            wanted = target[seen : seen + count].to(self.device) - _flat(before, batch, self.rows)
            seen += count
            x, y = _flat(x, batch, self.rows), _flat(y, batch, self.rows)
            writer, weight = self._writers[step.place], self.rows.weights(batch, self.omega).to(self.device)
            if writer.gain is None:
                error = wanted / writer.scale - y
            else:  # a norm keeps the direction alone: y need be no longer than it is
                rms = y.pow(2).mean(dim=1, keepdim=True).sqrt()
                error, weight = rms * wanted / writer.gain - y, weight / rms[:, 0].pow(2)
            yield Block(x, error, weight)

    # -- what is compared at the end ----------------------------------------------------------------------------------

    @property
    def parts(self) -> Sequence[Part]:
        """As the contract says."""
        return self.rows.parts

    @property
    def prompt_of_place(self) -> Int64[Tensor, " places"]:
        """As the contract says."""
        return self.rows.row_of_place

    def put_by(self, candidate: str) -> Mapping[str, tuple[Tensor, Tensor]]:
        """As the contract says."""
        return {module: (extra.a, extra.b) for module, extra in self.extras.get(candidate, {}).items()}

    def last_states(self, candidate: str | None) -> Float32[Tensor, "places width"]:
        """As the contract says."""
        return self._states[OLD if candidate is None else candidate][self.rows.places].to(self.device)

    def last_inputs(self, candidate: str) -> Float32[Tensor, "places d_in"]:
        """As the contract says."""
        return self._inputs[candidate]

    @property
    def last_writer(self) -> tuple[str, float] | None:
        """As the contract says."""
        last = self._writers[-1]
        return None if last.gain is not None else (last.name, last.scale)

    @property
    def gain(self) -> Float32[Tensor, " width"] | None:
        """As the contract says."""
        return self.new.gain

    def compare(self, states: Mapping[str, Tensor]) -> dict[str, Comparison]:
        """As the contract says."""
        old = self.old.finish(self.last_states(None))
        finished = {name: self.new.finish(state.to(self.device)) for name, state in states.items()}
        found = _Compared(len(old), finished, self.device)
        for start, stop in self.new.head_blocks():
            rows = range(start, stop)
            with self.old.head(rows) as old_logits, self.new.head(rows) as new_logits:
                found.add(start, old_logits(old), {name: new_logits(each) for name, each in finished.items()})
        asked = self.rows.is_asked
        return {name: self._by_prompt(nats[asked], same[asked]) for name, (nats, same) in found.results().items()}

    def likely(self, share: float) -> Int64[Tensor, " tokens"]:
        """As the contract says; the likeliest first."""
        if self._likely is None:
            is_fit = torch.tensor([part == "fit" for part in self.rows.parts])[self.rows.row_of_place]
            states = self.old.finish(self.last_states(None))[is_fit & self.rows.is_asked]
            softmax, blocks = _Softmax(len(states), self.device), []
            for start, stop in self.old.head_blocks():
                with self.old.head(range(start, stop)) as logits:
                    blocks.append(logits(states))
                    softmax.add(start, blocks[-1].double())
            self._likely = torch.cat([(each - softmax.normalizer[:, None]).exp().mean(dim=0) for each in blocks])
        order = self._likely.argsort(descending=True, stable=True)
        return order[self._likely[order] > share].cpu()

    def head(self, tokens: Int64[Tensor, " tokens"]) -> Float32[Tensor, "tokens width"]:
        """As the contract says."""
        return self.new.head_rows(tokens.tolist())

    def logits(self, tokens: Int64[Tensor, " tokens"], states: Tensor | None) -> Float32[Tensor, "places tokens"]:
        """As the contract says."""
        model, at = (self.old, self.last_states(None)) if states is None else (self.new, states)
        with model.head(tokens.tolist()) as logits:
            return logits(model.finish(at.to(self.device)))

    def _by_prompt(self, nats: Tensor, same: Tensor) -> Comparison:
        """What was found at places where answers are compared, by prompt."""
        rows = self.rows.row_of_place[self.rows.is_asked]
        counts = torch.bincount(rows, minlength=len(self.rows.ids))
        sums = torch.zeros(len(counts), dtype=torch.float64).index_add(0, rows, nats)
        agreeing = torch.zeros(len(counts), dtype=torch.float64).index_add(0, rows, same.double())
        return Comparison(sums / counts, agreeing == counts)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _batched(self, rows: Sequence[int]) -> list[list[int]]:
        lengths = [len(self.rows.ids[row]) for row in rows]
        return [[rows[place] for place in batch] for batch in batches(lengths, batch_size=self.batch_size)]

    def _all(self) -> list[list[int]]:
        return [*self._batches[True], *self._batches[False]]

    def _pad(self, batch: Sequence[int]) -> PaddedBatch:
        return pad_left([self.rows.ids[row] for row in batch], device=self.device)

    def _begin(self, name: str) -> None:
        model = self.old if name == OLD else self.new
        ids = torch.tensor([token for row in self.rows.ids for token in row])
        embedded = model.embed(ids)
        self._states[name] = torch.empty(self.rows.n_tokens, model.width)
        for batch in self._all():
            padded = self._pad(batch)
            begun = model.begin(padded, _spread(embedded, batch, self.rows, padded.ids.shape[1]))
            self._states[name][self.rows.tokens(batch)] = _flat(begun, batch, self.rows).cpu()

    def _padded(self, name: str, batch: Sequence[int]) -> Tensor:
        width = max(len(self.rows.ids[row]) for row in batch)
        return _spread(self._states[name].to(self.device), batch, self.rows, width)

    def _find(self, model: LayeredModel, number: int) -> list[Writer]:
        probe = pad_left([self.rows.ids[0][:4]], device=self.device)
        return find_writers(model, number, model.arguments(probe)[number], tokens=probe.ids.shape[1])

    def _run_old(self, number: int) -> None:
        """The old specialist through a layer; what it has behind each writer is kept for the rows to fit on."""
        writers = self._find(self.old, number)
        kept: list[list[Tensor]] = [[] for _ in writers]
        for batch in self._all():
            state = self._padded(OLD, batch)
            outputs: dict[int, Tensor] = {}
            is_fit = self.rows.parts[batch[0]] == "fit"
            modules = {
                writer.name: self.old.layers[number].get_submodule(_inner(self.old, number, writer.name))
                for writer in writers
            }
            places = {writer.name: place for place, writer in enumerate(writers)}

            def output(name: str, _: nn.Module, __: tuple[Tensor, ...], said: Tensor) -> None:
                outputs[places[name]] = said

            with hooked(modules, output):
                after = self.old.run(number, state, self.old.arguments(self._pad(batch))[number])
            if is_fit:
                for place, writer in enumerate(writers):
                    state = state + writer.added(outputs[place])
                    kept[place].append(_flat(state, batch, self.rows).cpu())
            self._states[OLD][self.rows.tokens(batch)] = _flat(after, batch, self.rows).cpu()
        self._targets = [torch.cat(each) for each in kept]

    def _run(self, number: int, candidate: str) -> None:
        last = number == len(self.new.layers) - 1
        inputs: list[Tensor] = []
        tokens: list[Tensor] = []
        for batch in self._all():
            found = self._watch(self.new, self._writers, number, candidate, batch, self._padded(candidate, batch))
            where = self.rows.tokens(batch)
            self._states[candidate][where] = _flat(found[-1][1], batch, self.rows).cpu()
            if last:
                inputs.append(_flat(found[len(self._writers) - 1][0], batch, self.rows).cpu())
                tokens.append(where)
        if last:
            every = torch.empty(self.rows.n_tokens, inputs[0].shape[1])
            every[torch.cat(tokens)] = torch.cat(inputs)
            self._inputs[candidate] = every[self.rows.places]

    @torch.no_grad()
    def _watch(
        self,
        model: LayeredModel,
        writers: Sequence[Writer],
        number: int,
        candidate: str,
        batch: Sequence[int],
        state: Tensor,
        *,
        stop: int | None = None,
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Input and output of each writer up to `stop`; at -1, the state before and behind the layer."""
        extras = self.extras.get(candidate, {})
        found: dict[int, tuple[Tensor, Tensor]] = {}
        places = {writer.name: place for place, writer in enumerate(writers)}

        def output(name: str, _: nn.Module, inputs: tuple[Tensor, ...], said: Tensor) -> Tensor:
            if name in extras:
                said = said + inputs[0] @ extras[name].a.T @ extras[name].b.T
            found[places[name]] = inputs[0], said
            if places[name] == stop:
                raise _EnoughError
            return said

        modules = {
            writer.name: model.layers[number].get_submodule(_inner(model, number, writer.name)) for writer in writers
        }
        with hooked(modules, output):
            try:
                after = model.run(number, state, model.arguments(self._pad(batch))[number])
            except _EnoughError:
                return found
        return {**found, -1: (state, after)}


class _Compared:
    """Divergence and agreement of several streams from one, over blocks of the vocabulary as they come."""

    def __init__(self, n: int, streams: Mapping[str, Tensor], device: torch.device) -> None:
        wide = {"dtype": torch.float64, "device": device}
        self._old = _Softmax(n, device)
        self._new = {name: _Softmax(n, device) for name in streams}
        self._cross = {name: torch.zeros(n, **wide) for name in streams}

    def add(self, start: int, old: Tensor, streams: Mapping[str, Tensor]) -> None:
        """The logits of some tokens."""
        old = old.double()
        before = self._old.most
        self._old.add(start, old)
        shares = (old - self._old.most[:, None]).exp()
        for name, logits in streams.items():
            wide = logits.double()
            self._new[name].add(start, wide)
            shrunk = self._cross[name] * (before - self._old.most).exp().nan_to_num(0.0)
            self._cross[name] = shrunk + (shares * (old - wide)).sum(dim=1)

    def results(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each stream, place by place: its divergence, and whether the likeliest token is the same."""
        return {
            name: (
                (cross / self._old.sum - self._old.normalizer + self._new[name].normalizer).clamp(min=0).cpu(),
                (self._old.likeliest == self._new[name].likeliest).cpu(),
            )
            for name, cross in self._cross.items()
        }


class _Softmax:
    """The normalizer of a softmax and its greatest entry, over blocks of logits as they come."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.most = torch.full((n,), -torch.inf, dtype=torch.float64, device=device)
        self.sum = torch.zeros(n, dtype=torch.float64, device=device)
        self.likeliest = torch.zeros(n, dtype=torch.int64, device=device)

    def add(self, start: int, logits: Tensor) -> None:
        """The logits of some tokens, from the token `start` on."""
        most, place = logits.max(dim=1)
        self.likeliest = torch.where(most > self.most, place + start, self.likeliest)
        greatest = torch.maximum(most, self.most)
        self.sum = self.sum * (self.most - greatest).exp() + (logits - greatest[:, None]).exp().sum(dim=1)
        self.most = greatest

    @property
    def normalizer(self) -> Tensor:
        """`log Σ exp(logit)`."""
        return self.most + self.sum.log()


def _inner(model: LayeredModel, number: int, name: str) -> str:
    return name.removeprefix(f"{model.names[number]}.")


def _flat(padded: Tensor, batch: Sequence[int], rows: Rows) -> Tensor:
    """The tokens of a batch without padding, row after row."""
    width = padded.shape[1]
    return torch.cat([padded[place, width - len(rows.ids[row]) :] for place, row in enumerate(batch)])


def _spread(flat: Tensor, batch: Sequence[int], rows: Rows, width: int) -> Tensor:
    """States of a batch with zeros for padding, from those of all tokens."""
    padded = flat.new_zeros(len(batch), width, flat.shape[1])
    for place, row in enumerate(batch):
        padded[place, width - len(rows.ids[row]) :] = flat[rows.starts[row] : rows.starts[row + 1]]
    return padded
