"""The old specialist and what is ported of it, run in step over the same rows, layer by layer from disk.

A layer of one model at a time is in memory: the old specialist's, whose states behind each writer, and outputs inside
the layer, are what the candidates are to reach on prompts; the bare evolved model's, whose are what they are to keep on
general text; and the evolved model's with the patch added, which the candidates share, each with its own changes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from portllm.arrays import Float32, Float64, Int64
from portllm.methods.contract import Block, Comparison, Part
from portllm.methods.ranks import Factors
from portllm.methods.tail import logit_moves
from portllm.porting.answers import compare_answers, expected_nats, mean_shares, nats_of
from portllm.porting.reading import FITTED, Reading
from portllm.porting.unfinished import Unfinished
from portllm.progress import Progress
from portllm.running.layers import LayeredModel
from portllm.running.spool import give_back_freed
from portllm.running.writers import Extras, Reader, Spoken, Writer, watch

ANSWER_SHARE = 0.001
"""A token to which the old specialist gives less than this, on average, is no answer."""

MOST_ANSWERS = 64


@dataclass
class Step:
    """A module that a candidate has come to; see `portllm.methods.contract.Fitting`."""

    streams: "Streams"
    number: int
    place: int
    module: str
    candidate: str

    @property
    def same_inputs(self) -> bool:
        """As the contract says."""
        return self.streams.same_inputs(self)

    def blocks(self) -> Iterator[Block]:
        """As the contract says."""
        return self.streams.blocks(self)

    def drift(self) -> Float32[Tensor, "d_out d_in"]:
        """As the contract says."""
        before, after = (model.weight(self.module) for model in (self.streams.prompts.model, self.streams.new))
        return after - before

    def put(self, factors: Factors) -> None:
        """As the contract says."""
        self.streams.put(self, factors.a.float(), factors.b.float())


@dataclass
class Passing:
    """Some rows to fit on, on their way through a layer.

    Attributes:
        reading: What they are of.
        batch: The rows.
        number: Among all that pass.
        wanted: By module that is fitted, in turn.
        known: By module that was looked at, but the last, what it says, padded: with what was put there once it was.
        place: Of the module that was looked at last, in the layer; -1 before the first.
        x: Its input, token by token.
        after: The state behind the layer, once its last module was looked at.
    """

    reading: Reading
    batch: list[int]
    number: int
    wanted: list[Tensor]
    known: dict[str, Tensor] = field(default_factory=dict)
    place: int = -1
    x: Tensor = field(default_factory=lambda: torch.empty(0))
    after: Tensor | None = None


@dataclass
class Streams:
    """Two models over the same rows; see `portllm.methods.contract.Streams`.

    Attributes:
        new: The evolved model with the patch added.
        prompts: The rows of the domain, with the old specialist's answers.
        others: What is read beside them: rows of general text, and rows with their right answers.
        progress: Told of the layers done.
        most_nats: What a candidate may cost beyond addition, in nats per token of general text.
        wanted: Share of answers that are to be the old specialist's; None for as many as can be.
        is_drawn: Whether the old specialist drew the prompts.
        unfinished: Where what has been done is kept.
        extras: By candidate and module, what was put there.
    """

    new: LayeredModel
    prompts: Reading
    others: Sequence[Reading]
    progress: Progress
    unfinished: Unfinished
    most_nats: float
    wanted: float | None = None
    is_drawn: bool = False
    extras: dict[str, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._modules: list[Spoken] = []
        self._passing: list[Passing] = []
        self._spool = self.unfinished.spool()
        self._likely: Tensor | None = None

    @property
    def readings(self) -> list[Reading]:
        """What is read."""
        return [self.prompts, *self.others]

    # -- walking ------------------------------------------------------------------------------------------------------

    def walk(self, candidates: Sequence[str], beside: Sequence[str] = (), *, label: str) -> Iterator[Step]:
        """As the contract says."""
        names = (*candidates, *beside)
        n_layers, n_done = len(self.new.layers), self._resume(names)
        for number in range(n_done, n_layers):
            for reading in self.readings:
                with reading.model.filled(number):
                    reading.run_wanted(number, is_fitted=bool(candidates))
            if candidates and number == n_layers - 1:
                self._aim()
            with self.new.filled(number):
                self._modules = self.prompts.spoken(self.new, number)
                for candidate in candidates:
                    batches = ((reading, *each) for reading in self.readings for each in enumerate(reading.to_fit))
                    self._passing = [
                        Passing(reading, batch, number_of, [of[place] for of in reading.wanted])
                        for number_of, (reading, place, batch) in enumerate(batches)
                    ]
                    for place, module in enumerate(self._modules):
                        yield Step(self, number, place, module.name, candidate)
                    self._run(number, candidate)
                self._passing = []
                for candidate in beside:
                    self._run_apart(number, candidate)
            give_back_freed()
            if number + 1 < n_layers:
                put, states = self._put_in(number, candidates), self._states(names)
                self.unfinished.keep_walked(number + 1, names, put, states)
            self.progress(label, number + 1, n_layers, "steps")

    def same_inputs(self, step: Step) -> bool:
        """Whether the module that was looked at last for a candidate is given the same."""
        since = self._modules[self._passing[0].place + 1 : step.place + 1]
        return self._passing[0].place >= 0 and all(isinstance(each, Reader) and each.follows for each in since)

    def blocks(self, step: Step) -> Iterator[Block]:
        """What a candidate gives a module, and what that lacks."""
        module, look = self._modules[step.place], self._once_more if self.same_inputs(step) else self._look
        for each in self._passing:
            before, output = look(step, each)
            each.place = step.place
            wanted = each.wanted[step.place].to(each.x.device)
            error, factor = module.error(wanted, before, output)
            kinds = each.reading.rows.kinds(each.batch).to(each.x.device)
            yield Block(each.x, self._kept(each, "error", error), kinds, factor)

    def _kept(self, each: Passing, name: str, values: Tensor) -> Tensor:
        """What is kept of some rows, until the same of another module or candidate takes its place."""
        return self._spool.keep((name, each.number), values)

    def _look(self, step: Step, each: Passing) -> tuple[Tensor, Tensor]:
        """Run some rows up to a module, behind the last one through the layer.

        Returns:
            The stream before what the module adds, and its output, token by token.
        """
        is_last = self._modules[step.place] is self._last
        state = each.reading.state(step.candidate, each.batch)
        found, after = watch(
            self.new,
            step.number,
            self._modules,
            state,
            each.reading.arguments(self.new, step.number, each.batch),
            self.put_by(step.candidate),
            stop=None if is_last else step.place,
            known=each.known,
        )
        for before, (_, output) in zip(self._modules[: step.place], found, strict=False):
            state = state + before.added(output)
        x, said = found[step.place]
        each.x = self._kept(each, "x", each.reading.flat(x, each.batch))
        if not is_last:
            each.known[step.module] = self._kept(each, f"known {step.place}", said)
        each.after = after if is_last and self._last.gain is None else None
        return each.reading.flat(state, each.batch), each.reading.flat(said, each.batch)

    def _once_more(self, step: Step, each: Passing) -> tuple[Tensor, Tensor]:
        """Run a reader on what the module before it was given; nothing that it adds is in the stream."""
        output = self.new.module(step.number, step.module)(each.x)
        said = each.reading.padded(output, each.batch)
        each.known[step.module] = self._kept(each, f"known {step.place}", said)
        return each.x, output

    def put(self, step: Step, a: Tensor, b: Tensor) -> None:
        """What a candidate has at a module; where nothing comes after it in the layer, its states follow."""
        self.extras.setdefault(step.candidate, {})[step.module] = (
            self._spool.keep((step.candidate, step.module, "a"), a),
            self._spool.keep((step.candidate, step.module, "b"), b),
        )
        for each in self._passing:
            moved = each.x @ a.T.to(each.x) @ b.T.to(each.x)
            if each.after is not None:
                each.after = each.after + self._last.scale * each.reading.padded(moved, each.batch)
            elif step.module in each.known:
                each.known[step.module] += each.reading.padded(moved, each.batch)

    def put_by(self, candidate: str) -> Extras:
        """As the contract says."""
        return self.extras.get(candidate, {})

    # -- what is compared at the end ----------------------------------------------------------------------------------

    @property
    def parts(self) -> Sequence[Part]:
        """As the contract says."""
        return self.prompts.rows.parts

    @property
    def compared(self) -> Sequence[Part]:
        """As the contract says."""
        return [part for part in self.parts if part not in FITTED]

    @property
    def part_of_place(self) -> Sequence[Part]:
        """As the contract says."""
        return [self.parts[row] for row in self.prompts.rows.row_of_place.tolist()]

    def last_states(self, candidate: str | None) -> Float32[Tensor, "places width"]:
        """As the contract says."""
        return self.prompts.last_states(candidate)

    def last_inputs(self, candidate: str) -> Float32[Tensor, "places d_in"]:
        """As the contract says."""
        return self.prompts.inputs[candidate]

    def last_writer(self) -> tuple[str, float] | None:
        """As the contract says."""
        last = self._last
        return None if last.gain is not None else (last.name, last.scale)

    def gain(self) -> Float32[Tensor, " width"] | None:
        """As the contract says."""
        return None if self.new.gain is None else self.new.gain.cpu()

    def compare(self, states: Mapping[str, Tensor]) -> dict[str, Comparison]:
        """As the contract says."""
        rows, wanted = self.prompts.rows, self.last_states(None)
        apart = ~rows.is_of("fit")
        candidates = {name: state[apart] for name, state in states.items()}
        found = compare_answers(self.prompts.model, wanted[apart], self.new, candidates)
        give_back_freed()
        return {
            name: Comparison(rows.by_row(nats, apart), rows.by_row(same, apart)) for name, (nats, same) in found.items()
        }

    def likely(self) -> Int64[Tensor, " tokens"]:
        """As the contract says: those with more than a share, on average over the places to fit on."""
        if self._likely is None:
            self._likely = mean_shares(self.prompts.model, self.last_states(None)[self.prompts.rows.is_of("fit")])
        order = self._likely.argsort(descending=True, stable=True)[:MOST_ANSWERS]
        return order[self._likely[order] > ANSWER_SHARE]

    def head(self, tokens: Int64[Tensor, " tokens"]) -> Float32[Tensor, "tokens width"]:
        """As the contract says."""
        return self.new.head_rows(tokens.tolist()).cpu()

    def logits(self, tokens: Int64[Tensor, " tokens"], states: Tensor | None) -> Float32[Tensor, "places tokens"]:
        """As the contract says."""
        model, at = (self.prompts.model, self.last_states(None)) if states is None else (self.new, states)
        with model.head(tokens.tolist()) as logits:
            return logits(model.finish(at)).cpu()

    def anchor_inputs(self, candidate: str) -> Float32[Tensor, "anchors d_in"] | None:
        """As the contract says."""
        reading = self._with("anchor")
        return None if reading is None else reading.inputs[candidate][reading.rows.is_of("anchor")]

    def nats(self, part: Part, tails: Mapping[str, tuple[str | None, Extras]]) -> dict[str, Float64[Tensor, " rows"]]:
        """As the contract says."""
        reading = self._with(part)
        if reading is None:
            return {}
        there = reading.rows.is_of(part)
        wanted, states = reading.last_states(None)[there], {}
        for name, (candidate, tail) in tails.items():
            if candidate is not None:
                states[name] = reading.last_states(candidate)[there]
                for a, b in tail.values():
                    u = reading.inputs[candidate][there]
                    states[name] = states[name] + self._last.scale * u @ a.T.float() @ b.T.float()
        if part == "judge":
            said = torch.tensor(reading.rows.next_ids)[there]
            own = nats_of(reading.model, wanted, said)
            found = {name: nats_of(self.new, state, said) for name, state in states.items()}
        else:
            own, found = expected_nats(reading.model, wanted, self.new, states)
        give_back_freed()
        return {name: reading.rows.by_row(found.get(name, own), there) for name in tails}

    def aims(self) -> Float32[Tensor, "places width"]:
        """As the contract says."""
        states, tokens, gain = self.last_states(None), self.likely(), self.gain()
        if gain is None or len(tokens) < 2:
            return states
        missing = self.logits(tokens, None) - self.logits(tokens, states)
        return (states + logit_moves(missing, self.head(tokens), gain, states)).float()

    @property
    def _last(self) -> Writer:
        """The layer's last writer, behind which no module speaks."""
        last = self._modules[-1]
        if not isinstance(last, Writer):
            raise AssertionError("a layer ends with what writes")
        return last

    # -- inside -------------------------------------------------------------------------------------------------------

    def _with(self, part: Part) -> Reading | None:
        return next((reading for reading in self.others if part in reading.rows.parts), None)

    def _resume(self, candidates: Sequence[str]) -> int:
        """Begin where an earlier run has come to, or before the first layer; how many layers are done."""
        for reading in self.readings:
            for name in (None, *candidates):
                reading.states[name] = reading.spool.room(name, reading.rows.n_tokens, self.new.width)
        n_done = self.unfinished.walked(candidates, self._states(candidates))
        if not n_done:
            for reading in self.readings:
                for name in (None, *candidates):
                    reading.begin(name, reading.model if name is None else self.new)
        tensors = self.unfinished.put(candidates, n_done)
        for key in (key for key in tensors if key.startswith("a/")):
            _, candidate, module = key.split("/")
            self.extras.setdefault(candidate, {})[module] = tensors[key], tensors[f"b{key[1:]}"]
        return n_done

    def _states(self, candidates: Sequence[str]) -> list[Tensor]:
        """The states that a walk carries from layer to layer."""
        return [reading.states[name] for reading in self.readings for name in (None, *candidates)]

    def _put_in(self, number: int, candidates: Sequence[str]) -> dict[str, Tensor]:
        """What some candidates have in a layer."""
        return {
            f"{side}/{candidate}/{module}": tensor.cpu().clone(memory_format=torch.contiguous_format)
            for candidate in candidates
            for module, pair in self.put_by(candidate).items()
            if module.startswith(f"{self.new.names[number]}.")
            for side, tensor in zip("ab", pair, strict=True)
        }

    def _aim(self) -> None:
        """Behind the last layer, wanted where an answer is said is what the evolved head reads as that answer."""
        reading, rows = self.prompts, self.prompts.rows
        moves = torch.zeros(rows.n_tokens, self.new.width)
        moves[rows.places] = self.aims() - self.last_states(None)
        for batch, wanted in zip(reading.to_fit, reading.wanted[-1], strict=True):
            wanted += moves[rows.tokens(batch)]

    def _run(self, number: int, candidate: str) -> None:
        """A candidate through a layer; what was fitted on has come through already where its last module was fitted."""
        is_last = number == len(self.new.layers) - 1
        for reading in self.readings:
            done = [
                (each.batch, each.x, each.after)
                for each in self._passing
                if each.reading is reading and each.after is not None
            ]
            batches = (*(() if done else reading.to_fit), *reading.others)
            inputs: list[tuple[Tensor, Tensor]] = []
            through = (self._through(reading, number, candidate, batch) for batch in batches)
            for batch, x, after in chain(done, through):
                reading.keep(candidate, batch, after)
                if is_last:
                    tokens = reading.rows.tokens(batch)
                    is_place = torch.isin(tokens, reading.rows.places)
                    inputs.append((tokens[is_place], x.cpu()[is_place]))
            if is_last:
                order = torch.cat([tokens for tokens, _ in inputs]).argsort()
                reading.inputs[candidate] = torch.cat([x for _, x in inputs])[order]

    def _run_apart(self, number: int, candidate: str) -> None:
        """A candidate through a layer, on rows that nothing is fitted on."""
        for reading in self.readings:
            for batch in reading.others:
                given = reading.arguments(self.new, number, batch)
                reading.keep(candidate, batch, self.new.run(number, reading.state(candidate, batch), given))

    def _through(
        self, reading: Reading, number: int, candidate: str, batch: list[int]
    ) -> tuple[list[int], Tensor, Tensor]:
        """A batch, the input that a layer's last module has of it, and the state behind the layer."""
        given = reading.arguments(self.new, number, batch)
        state, extras = reading.state(candidate, batch), self.put_by(candidate)
        ((x, _),), after = watch(self.new, number, self._modules, state, given, extras, first=len(self._modules) - 1)
        return batch, reading.flat(x, batch), after
