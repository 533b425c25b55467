"""What a port method is: what it asks for, what it is given, what it gives.

A method is a pure function of a patch and its inputs: no file, no clock, no chance but through a parameter that its id
records. It sees the whole patch, since what is done to one layer may depend on what was done to those before it, and
gives the patch for the evolved model: the same modules and tensors, each with the shape it had and the scale that its
configuration says. Tensors are `Values`, read when asked for; what a method passes on as it is goes to the new file
byte for byte.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from portllm.methods.values import Values
from portllm.patch.patch import Patch
from portllm.patch.record import Tried

if TYPE_CHECKING:
    from torch import Tensor

    from portllm.arrays import Bool, Float32, Float64, Int64
    from portllm.methods.ranks import Factors

Part = Literal["fit", "choose", "report", "judge", "anchor", "limit", "price"]
"""What a text is for, and none for two of these.

A prompt is to fit on, to choose by or to report on; a row with its right answer is to choose by where there are some
(`judge`); general text is to fit on (`anchor`), to leave out what costs too much there (`limit`), or to report what the
choice costs (`price`).
"""


class Need(StrEnum):
    """What a method asks for beside the patch."""

    WEIGHTS = "weights"
    """The weights of what the patch changes, in the base that it belongs to and in the evolved model."""

    STREAMS = "streams"
    """The old specialist and the evolved model, run in step over prompts."""

    PAIRS = "pairs"
    """What both models, without the patch, give each of its modules for the same tokens, and what those make of it."""


class Kind(IntEnum):
    """What a token is to a fit."""

    FIRST = 0
    """The first of a text: its state is many times larger than all others, whatever the text (an attention sink)."""

    PROMPT = 1
    ANSWER = 2
    """One of the answer comes after it."""

    GENERAL = 3


@dataclass(frozen=True, slots=True)
class Block:
    """What a candidate gives a module for some tokens.

    Attributes:
        x: The module's input.
        error: What its output lacks: for the residual stream behind it to be what is wanted, where it writes to that,
            else for the output itself to be what is wanted.
        kind: What each token is, as a `Kind`.
        factor: How much an error of each counts beside those of others of its kind.
    """

    x: "Float32[Tensor, 'tokens d_in']"
    error: "Float32[Tensor, 'tokens d_out']"
    kind: "Int64[Tensor, ' tokens']"
    factor: "Float32[Tensor, ' tokens']"


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the answers of a model compare with the old specialist's, prompt by prompt of those that are compared.

    Attributes:
        nats: Mean of `KL(old specialist ‖ model)` over the places of the answer, whole vocabulary.
        alike: Share of these places at which the likeliest token is the same.
    """

    nats: "Float64[Tensor, ' prompts']"
    alike: "Float64[Tensor, ' prompts']"

    @property
    def agrees(self) -> "Bool[Tensor, ' prompts']":
        """Whether the likeliest token is the same at every place of the answer."""
        return self.alike == 1


@runtime_checkable
class Fitting(Protocol):
    """A module that can be fitted, when a candidate has come to it."""

    @property
    def module(self) -> str:
        """Its name."""

    @property
    def candidate(self) -> str:
        """The candidate."""

    @property
    def same_inputs(self) -> bool:
        """Whether it is given what the module was whose blocks were taken before, as q, k and v of an attention are."""

    def blocks(self) -> "Iterable[Block]":
        """What the candidate gives it, over all that is to be fitted on: prompts, and general text where there is some.

        On prompts the old specialist's state or output is wanted, on general text that of the bare evolved model.
        """

    def drift(self) -> "Float32[Tensor, 'd_out d_in']":
        """The evolved model's weights there less the base's, read from disk."""

    def put(self, factors: "Factors") -> None:
        """From here on the candidate adds `b a x` to the module's output, beside the patch as it was added."""


@runtime_checkable
class Streams(Protocol):
    """Two models over the same prompts: the base with its patch, and the evolved model with candidates for one.

    Answers are what the old specialist says to the prompts, to their end. Places are the tokens that have one of an
    answer after them, those of all prompts one after another.
    """

    @property
    def wanted(self) -> float | None:
        """How much of the old answers is to be given, above which no more is tried; None for the most."""

    @property
    def most_nats(self) -> float:
        """What a candidate may cost beyond addition, in nats per token of general text."""

    @property
    def is_drawn(self) -> bool:
        """Whether the old specialist drew the prompts itself."""

    @property
    def parts(self) -> "Sequence[Part]":
        """What each prompt is for."""

    @property
    def compared(self) -> "Sequence[Part]":
        """The same of those that nothing is fitted on: answers to the others are compared with nobody's."""

    @property
    def part_of_place(self) -> "Sequence[Part]":
        """What the prompt of each place is for."""

    def walk(self, candidates: "Sequence[str]", beside: "Sequence[str]" = (), *, label: str) -> "Iterator[Fitting]":
        """All that writes to the residual stream, and what else the patch changes, in the order in which they speak.

        All of a layer are given out for one candidate, which is run up to each before, then for the next one. What was
        walked before stays.

        Args:
            candidates: Run over all rows.
            beside: Further ones, run as they are over the rows that nothing is fitted on, which is half of the work;
                what is asked of their states on others, or of their last inputs, has no answer.
            label: Of the progress.
        """

    def put_by(self, candidate: str) -> "Mapping[str, tuple[Tensor, Tensor]]":
        """By module, a and b of what a candidate was given by `Fitting.put`."""

    def last_states(self, candidate: str | None) -> "Float32[Tensor, 'places width']":
        """The residual stream behind the last layer, once the walk is over; None is the old specialist."""

    def last_inputs(self, candidate: str) -> "Float32[Tensor, 'places d_in']":
        """The input of the last writer."""

    def last_writer(self) -> tuple[str, float] | None:
        """Its name, and what its output is multiplied by; None where a norm stands between it and the stream."""

    def gain(self) -> "Float32[Tensor, ' width'] | None":
        """Weight of the evolved model's last norm, where that is `g · r / rms(r)`; None for any other."""

    def compare(self, states: "Mapping[str, Float32[Tensor, 'places width']]") -> Mapping[str, Comparison]:
        """The answers of the evolved model with these states behind its last layer, to the prompts of `compared`."""

    def likely(self) -> "Int64[Tensor, ' tokens']":
        """Tokens that the old specialist answers with, the likeliest first."""

    def aims(self) -> "Float32[Tensor, 'places width']":
        """The old specialist's last states, moved to where the evolved head gives its answers their old logits."""

    def head(self, tokens: "Int64[Tensor, ' tokens']") -> "Float32[Tensor, 'tokens width']":
        """Rows of the evolved model's head."""

    def logits(
        self, tokens: "Int64[Tensor, ' tokens']", states: "Float32[Tensor, 'places width'] | None"
    ) -> "Float32[Tensor, 'places tokens']":
        """Of some tokens: the evolved model's for these states, the old specialist's own for None."""

    def anchor_inputs(self, candidate: str) -> "Float32[Tensor, 'anchors d_in'] | None":
        """The last writer's inputs on the general text to fit on; None where there is no general text."""

    def nats(
        self, part: Part, tails: "Mapping[str, tuple[str | None, Mapping[str, tuple[Tensor, Tensor]]]]"
    ) -> "Mapping[str, Float64[Tensor, ' rows']]":
        """What each row of a part that is neither fitted nor answered by a model costs a candidate, in nats a token.

        Of rows with right answers that is `-log q(token)` of these. Of general text it is `-Σ p log q`, with p what the
        bare evolved model holds for the next token. A candidate may have some factors more at the last writer. None
        is, of general text, the bare evolved model, and of rows with right answers the old specialist. Empty where
        there are no such rows.
        """


@dataclass(frozen=True, slots=True)
class Seen:
    """What is seen of a module of a model; a row a token.

    Attributes:
        x: What it was given.
        y: What it gave, or what has the basis of that, and spans more of it.
    """

    x: "Float32[Tensor, 'tokens d_in']"
    y: "Float32[Tensor, 'tokens d_out']"


@dataclass(frozen=True, slots=True)
class Pair:
    """A module of the patch in both models, both without it, on the same tokens.

    Attributes:
        module: Its name.
        before: In the base.
        after: In the evolved model.
    """

    module: str
    before: Seen
    after: Seen


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a method is given beside the patch: what it declared, and nothing else.

    Rows that stand for tokens are those of the evolved model, on both sides; a token that the base lacks has zeros
    there.

    Attributes:
        base: With `Need.WEIGHTS`, by the name that the patch has for a tensor, its values in the base.
        evolved: Likewise in the evolved model, in the same shape: (experts, d_out, d_in) for the experts of a layer.
        streams: With `Need.STREAMS`, what runs both models, given the patch as it is added to the evolved one.
        pairs: With `Need.PAIRS`, what runs both models without the patch, given the modules to be looked at; these come
            in the order in which they are run.
    """

    base: Mapping[str, Values] = field(default_factory=dict)
    evolved: Mapping[str, Values] = field(default_factory=dict)
    streams: Callable[[Patch[Values]], Streams] | None = None
    pairs: Callable[[Collection[str]], Iterator[Pair]] | None = None


@dataclass(frozen=True, slots=True)
class Ported:
    """What a method gives.

    Attributes:
        patch: The patch of the evolved model.
        evidence: What was measured on the way, finite numbers by name; goes into `patch.json`.
        how: What was chosen on the way, with every parameter that changes the result; stands behind the method's id.
        tried: What it was chosen from; goes into `patch.json`.
    """

    patch: Patch[Values]
    evidence: Mapping[str, float] = field(default_factory=dict)
    how: str | None = None
    tried: tuple[Tried, ...] = ()


@dataclass(frozen=True, slots=True)
class PortMethod:
    """One row of the table.

    Attributes:
        id: Stands in `patch.json`; names the method and every parameter that changes its result.
        port: The function.
        summary: One line for people.
        reference: Paper and equation.
        needs: What it asks for, whatever the patch.
        suits: Why the method is known to carry a patch, given the answer of `check` and the numbers that it rests on;
            None where it is not known to.
        refuses: Why it cannot carry a patch, whatever the models; None where it can.
    """

    id: str
    port: Callable[[Patch[Values], Inputs], Ported]
    summary: str
    reference: str
    needs: frozenset[Need] = frozenset()
    suits: Callable[[str, Mapping[str, float]], str | None] = lambda _verdict, _evidence: None
    refuses: Callable[[Patch[Any]], str | None] = lambda _patch: None

    def needs_for(self, patch: Patch[Any]) -> frozenset[Need]:
        """What carrying this patch takes: what it holds whole is no delta without the weights that it stands for."""
        return self.needs if patch.is_relative else self.needs | {Need.WEIGHTS}
