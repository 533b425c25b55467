"""Carries a patch to a model of another family, with other widths, depth and tokenizer. An experiment, no port method.

    python -m scripts.other_family --base builtin:smollm2-135m --patch OLD --evolved gemma-3-270m --task NAME \
        --text prompts.jsonl --prompt TEMPLATE --anchors general.jsonl --rows rows.jsonl --retrained RETRAINED -o PORTED

Both bases and the old specialist (base and patch) read the same prompts, with the old specialist's answers. Layers are
paired by depth, tokens by where they end in the text. What the patch moves in the old residual stream is taken to the
new one by a linear map between the bases' states, in ridge regression:

    M = argmin |(Y - mean) - (X - mean) M|² + λ |M|²       X, Y: states of the old and of the new base
    wanted = y + (x' - x) M                                x': the old specialist's state in the place of x

Each module that writes to the new stream gets factors by reduced-rank ridge regression of what it lacks on its input,
first layer to last, with those before in force. Behind the last layer, wanted is also moved to where the new head gives
the tokens of the answers their old logits. One of some settings is chosen by the answers to prompts that nothing was
fitted on. Labeled rows, which chose nothing, are scored with `portllm.evaluate`; what came of all is written into
`studies/results/other-family.json`, which docs/methods/transport.md shows.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from portllm import evaluate
from portllm.capturing.stored_values import StoredValues, settled
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.errors import PortLLMError
from portllm.evaluating.names import PATCHED
from portllm.files.output_folder import resumable_folder
from portllm.matching.changes import oriented
from portllm.methods.choice import choose, distance, wilson
from portllm.methods.contract import Part
from portllm.methods.ranks import Factors, with_appended
from portllm.methods.tail import Regression, logit_moves
from portllm.methods.values import Values
from portllm.patch.adapter_folder import PatchLike, load_patch, write_patch
from portllm.patch.patch import Patch
from portllm.porting.prompts import Ids, Rows, split
from portllm.porting.reading import Reading
from portllm.porting.streams import Streams
from portllm.porting.unfinished import Unfinished
from portllm.porting.weights import PatchedWeights
from portllm.progress import silent
from portllm.running.data import read_data
from portllm.running.encoding import Encoder, encode_prompts
from portllm.running.examples import Border, read_prompts, read_texts
from portllm.running.folder import model_folder
from portllm.running.layers import LayeredModel
from portllm.running.model import load_tokenizer
from portllm.running.spool import Spool
from portllm.running.writing import write_layered

RESULTS = Path(__file__).parents[1] / "studies" / "results" / "other-family.json"

CPU = torch.device("cpu")
BATCH = 16
LONGEST, ANSWER_TOKENS, GENERAL_TOKENS = 512, 8, 48
RANK = 16
MAP_RIDGE = 0.01
OMEGA, GENERAL = 0.05, 0.2
"""What a token of a prompt, and one of general text, counts beside one with a token of an answer after it."""

LIKELY = 64
"""Tokens whose logits are wanted: the likeliest of both models, where both vocabularies have them."""

LEAST_LOGIT = -12.0
"""That is wanted, beside the likeliest token's: what is never said need not be so to the last bit."""

PRICE: tuple[Part, ...] = ("anchor", "price")

NOTHING = "no patch"


@dataclass(frozen=True, slots=True)
class Setting:
    """Which modules are fitted, and how.

    Attributes:
        first: The layer to begin with, as a share of all.
        rho: Ridge, as a share of the mean square of an input.
    """

    first: float
    rho: float

    @property
    def name(self) -> str:
        """What stands in the results."""
        return f"from {self.first:.2g} of the depth, rho={self.rho}"


SETTINGS = [Setting(first, rho) for first in (0.9, 2 / 3, 0.0) for rho in (1.0, 0.1)]
"""The simplest first. From 0.9 of 18 layers on, that is the last one alone: what the answers teach without the states
before them."""


@dataclass(frozen=True)
class Side:
    """A base, with its tokenizer."""

    checkpoint: Checkpoint

    @cached_property
    def encoder(self) -> Encoder:
        """Of its texts."""
        return Encoder(load_tokenizer(model_folder(self.checkpoint)), Border(lead=""))

    def model(self, patch: Patch[Values] | None = None) -> LayeredModel:
        """The base, bare or with a patch."""
        weights = PatchedWeights(self.checkpoint, patch)
        return LayeredModel(model_folder(self.checkpoint), weights, device=CPU, longest=LONGEST)

    def answered(self, prompt: str, answer: str) -> tuple[Ids, Ids]:
        """Ids of a prompt and of what is written behind it, its own space included, which may be nothing."""
        if not answer:
            return self.encoder.encode_text(prompt), ()
        encoded = self.encoder.encode(prompt, answer)
        return encoded.prompt, encoded.completion

    def ends(self, rows: Rows) -> list[dict[int, int]]:
        """By row, where tokens end in its text, and which they are among all; the first that ends there."""
        found = []
        for start, ids in zip(rows.starts, rows.ids, strict=False):
            lengths = [len(self.encoder.decode(ids[: n + 1])) for n in range(len(ids))]
            found.append({length: start + n for n, length in reversed(list(enumerate(lengths)))})
        return found

    def twin(self, token: int, other: "Side") -> int | None:
        """The one token of another vocabulary that says the same; None where there is none."""
        if token in self.encoder.stops:
            return other.encoder.end if token == self.encoder.end else None
        text = self.encoder.tokenizer.decode([token])
        ids = other.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids[0] if len(ids) == 1 and other.encoder.tokenizer.decode(ids) == text else None


@dataclass(frozen=True)
class Answers:
    """What the old specialist answers, where the new model's tokens have their pairs.

    Attributes:
        places: Among all tokens of the new rows.
        row: Of each place.
        said: The old specialist's probabilities of all its tokens at each.
        tokens: Of these, some that either model finds likely.
        twins: The same in the new vocabulary.
    """

    places: Tensor
    row: Tensor
    said: Tensor
    tokens: list[int]
    twins: list[int]

    @classmethod
    def of(cls, carried: "Carried") -> "Answers":
        """Once the old models are through their last layer."""
        here, there = carried.paired
        both = torch.isin(here, carried.rows.places) & torch.isin(there, carried.tuned.rows.places)
        places, row = here[both], row_of(carried.rows, here[both])
        said = carried.tuned.model.logits(carried.tuned.states[None][there[both]]).softmax(dim=1)
        found = carried.model.logits(carried.states[None][places]).softmax(dim=1)
        fit = carried.is_fitted(row)
        old, new = carried.sides
        likely = [side[fit].mean(dim=0).topk(LIKELY).indices.tolist() for side in (said, found)]
        twins = {token: old.twin(token, new) for token in likely[0]}
        twins |= {back: token for token in likely[1] if (back := new.twin(token, old)) is not None}
        known = {token: twin for token, twin in twins.items() if twin is not None}
        return cls(places, row, said, list(known), list(known.values()))

    def moves(self, model: LayeredModel, states: Tensor) -> Tensor:
        """What the states of places lack for the new head to give the tokens their old logits."""
        if model.gain is None:
            raise PortLLMError("the new base: its last norm is no RMS norm, so its logits cannot be fitted.")
        wanted = self.said[:, self.tokens].log()
        wanted = (wanted - wanted.max(dim=1, keepdim=True).values).clamp(min=LEAST_LOGIT)
        missing = wanted - model.logits(states[self.places])[:, self.twins]
        return logit_moves(missing, model.head_rows(self.twins), model.gain, states[self.places]).float()

    def compare(self, sides: tuple[Side, Side], model: LayeredModel, states: Tensor) -> tuple[Tensor, Tensor]:
        """By row, the mean divergence from the old specialist, and whether the same is likeliest at all places.

        The divergence is of the tokens that both vocabularies have, all others taken together: at most the whole one.
        """
        found = model.logits(states[self.places]).softmax(dim=1)
        shares = (self.said[:, self.tokens].double(), found[:, self.twins].double())
        p, q = (torch.cat([each, (1 - each.sum(dim=1, keepdim=True))], dim=1).clamp(min=1e-12) for each in shares)
        best = zip(self.said.argmax(dim=1).tolist(), found.argmax(dim=1).tolist(), strict=True)
        same = torch.tensor([sides[0].twin(before, sides[1]) == after for before, after in best])
        rows = torch.unique(self.row)
        nats = torch.stack([(p * (p / q).log()).sum(dim=1)[self.row == row].mean() for row in rows])
        return nats, torch.stack([same[self.row == row].all() for row in rows])


@dataclass
class Carried(Reading):
    """The new base over prompts, where wanted is its state, moved by what the patch moves in the old stream.

    Attributes:
        base: The old base over the same prompts.
        tuned: The old specialist, likewise.
        sides: The old and the new base.
        n_old: Layers that the old models are through.
    """

    base: Reading = field(kw_only=True)
    tuned: Reading = field(kw_only=True)
    sides: tuple[Side, Side] = field(kw_only=True)
    n_old: int = field(default=0, kw_only=True)

    @cached_property
    def paired(self) -> tuple[Tensor, Tensor]:
        """Tokens of the new and of the old base that end at the same place of a text, among all of each."""
        old, new = self.sides[0].ends(self.base.rows), self.sides[1].ends(self.rows)
        pairs = [
            (here[end], there[end])
            for there, here in zip(old, new, strict=True)
            for end in sorted(there.keys() & here.keys() - {0})
        ]
        here, there = torch.tensor(pairs).T.contiguous()
        return here, there

    @cached_property
    def answers(self) -> Answers:
        """Of the old specialist."""
        return Answers.of(self)

    def is_fitted(self, row: Tensor) -> Tensor:
        """Whether rows are fitted on."""
        return torch.tensor([part == "fit" for part in self.rows.parts])[row]

    def run_wanted(self, number: int, *, is_fitted: bool) -> None:
        """The new base through a layer, the old models through as many as are as deep."""
        super().run_wanted(number, is_fitted=is_fitted)
        n_layers = len(self.model.layers)
        n_old = max(1, round((number + 1) * len(self.base.model.layers) / n_layers))
        for reading in (self.base, self.tuned):
            for layer in range(self.n_old, n_old):
                with reading.model.filled(layer):
                    reading.run_wanted(layer, is_fitted=is_fitted)
        self.n_old = n_old
        for place, wanted in enumerate(self.wanted):
            moves = self._moves(place)
            if number + 1 == n_layers and place + 1 == len(self.wanted):
                moves[self.answers.places] += self.answers.moves(self.model, self.states[None] + moves)
            for batch, of in zip(self.to_fit, wanted, strict=True):
                of += moves[self.rows.tokens(batch)]

    def _moves(self, place: int) -> Tensor:
        """What the patch moves behind a writer, in the new stream, by token; not a number for those without a pair."""
        fitted = self.is_fitted(row_of(self.rows, self.paired[0]))
        here, there = (tokens[fitted] for tokens in self.paired)
        x, y = behind(self.base, place)[there].double(), behind(self, place)[here].double()
        moved = behind(self.tuned, place)[there].double() - x
        x, y = x - x.mean(dim=0), y - y.mean(dim=0)
        squares = x.T @ x
        squares += MAP_RIDGE * squares.diagonal().mean() * torch.eye(len(squares))
        moves = torch.full((self.rows.n_tokens, y.shape[1]), torch.nan)
        moves[here] = (moved @ torch.linalg.solve(squares, x.T @ y)).float()
        return moves


def row_of(rows: Rows, tokens: Tensor) -> Tensor:
    """The row of tokens, by their place among all."""
    return torch.bucketize(tokens, torch.tensor(rows.starts), right=True) - 1


def behind(reading: Reading, place: int) -> Tensor:
    """A model's states behind a writer of the layer that it was run through last; zeros for what is not fitted on."""
    states = torch.zeros(reading.rows.n_tokens, reading.model.width)
    for batch, wanted in zip(reading.to_fit, reading.wanted[place], strict=True):
        states[reading.rows.tokens(batch)] = wanted
    return states


def opened(
    old: Side,
    new: Side,
    patch: Patch[Values],
    prompts: Sequence[str],
    general: Sequence[str],
    unfinished: Unfinished,
) -> tuple[Streams, Carried]:
    """All models over prompts, with the old specialist's answers, and over general text."""
    base, tuned, bare = old.model(), old.model(patch), new.model()
    asked, _ = encode_prompts(old.encoder, prompts, room=LONGEST - ANSWER_TOKENS)
    written = write_layered(
        tuned,
        asked,
        most=ANSWER_TOKENS,
        ends=old.encoder.stops,
        pick=lambda logits: logits.argmax(dim=1),
        batch_size=BATCH,
        spool=unfinished.spool(),
    )
    said = [new.answered(prompt, old.encoder.decode(ids)) for prompt, ids in zip(prompts, written.ids, strict=True)]
    ends = [[new.encoder.end] if ids[-1] in old.encoder.stops else [] for ids in written.ids]
    rows = Rows.answered(asked, written.ids, split(prompts))
    answers = [(*text, *end) for (_, text), end in zip(said, ends, strict=True)]
    new_rows = Rows.answered([prompt for prompt, _ in said], answers, rows.parts)
    read = [new.encoder.encode_text(text)[:GENERAL_TOKENS] for text in general]
    dealt = tuple(PRICE[place % 2] for place in range(len(read)))

    def over(model: LayeredModel, rows: Rows) -> tuple[Rows, LayeredModel, frozenset[str], torch.device, int, Spool]:
        return rows, model, frozenset(), CPU, BATCH, unfinished.spool()

    carried = Carried(
        *over(bare, new_rows), base=Reading(*over(base, rows)), tuned=Reading(*over(tuned, rows)), sides=(old, new)
    )
    for reading in (carried.base, carried.tuned):
        reading.states[None] = reading.spool.room(None, rows.n_tokens, reading.model.width)
        reading.begin(None, reading.model)
    others = Reading(*over(bare, Rows.answered([ids[:1] for ids in read], [ids[1:] for ids in read], dealt)))
    return Streams(new.model(), carried, [others], silent, unfinished, most_nats=0.0), carried


def fit(streams: Streams, settings: Mapping[str, Setting]) -> None:
    """Fit what writes to the new stream, for some settings."""
    n_layers = len(streams.new.layers)
    for step in streams.walk([NOTHING, *settings], label="fit"):
        how = settings.get(step.candidate)
        if how is None or step.number < how.first * n_layers:
            continue
        blocks = list(step.blocks())
        weights = torch.cat([torch.tensor([0.0, OMEGA, 1.0, GENERAL])[block.kind] * block.factor for block in blocks])
        inputs, errors = (torch.cat([getattr(block, name) for block in blocks]) for name in ("x", "error"))
        known = errors.isfinite().all(dim=1)
        found = Regression.on(inputs[known], weights[known], rho=how.rho).fit(errors[known], rank=RANK)
        step.put(Factors(found.a.float(), found.b.float()))


@dataclass(frozen=True)
class Outcome:
    """What came of it on the prompts.

    Attributes:
        chosen: The setting.
        numbers: As the results have them.
        factors: By module.
    """

    chosen: str
    numbers: Mapping[str, object]
    factors: Mapping[str, Factors]


def chosen(streams: Streams, carried: Carried, names: Sequence[str]) -> Outcome:
    """The setting whose answers are nearest on the prompts to choose by, and its agreement on those to report on."""
    answers, model = carried.answers, streams.new
    compared = {name: answers.compare(carried.sides, model, carried.states[name]) for name in names}
    parts = [carried.rows.parts[row] for row in torch.unique(answers.row).tolist()]
    there = {part: torch.tensor([each == part for each in parts]) for part in ("choose", "report")}
    best = choose({name: distance(nats[there["choose"]]) for name, (nats, _) in compared.items()})
    price = streams.nats("price", {name: (name, {}) for name in names})
    tried = {
        name: {
            "divergence": float(nats[there["choose"]].mean()),
            "agreement": share(same[there["report"]].tolist()),
            "general_nats": float(price[name].mean()),
        }
        for name, (nats, same) in compared.items()
    }
    numbers = {"chosen": best, "prompts": len(parts), "tried": tried}
    return Outcome(best, numbers, {module: Factors(*put) for module, put in streams.put_by(best).items()})


def scored(given: argparse.Namespace) -> dict[str, object]:
    """Right answers, and answers as the old specialist's, of labeled rows."""
    found = evaluate(
        given.rows,
        base=given.base,
        patch=given.patch,
        evolved=given.evolved,
        ported=given.output,
        retrained=given.retrained,
        dtype="float32",
    )
    before = next(row.scores.answers for row in found.rows if row.name == PATCHED)
    return {
        row.name: {
            "accuracy": row.score.to_json(),
            "loss": row.loss.to_json(),
            "agreement": share([one == other for one, other in zip(before, row.scores.answers, strict=True)]),
        }
        for row in found.rows
    }


def share(there: Sequence[bool]) -> list[float]:
    """Of what is true, with its 95 % interval."""
    return [round(each, 6) for each in (sum(there) / len(there), *wilson(sum(there), len(there)))]


def carry(
    base: ModelLike, patch: PatchLike, evolved: ModelLike, prompts: Sequence[str], general: Sequence[str], out: Path
) -> dict[str, object]:
    """Write the adapter of the new base; what was measured of it on prompts and general text.

    Raises:
        PortLLMError: No setting is better than no patch.
    """
    old, new = Side(open_checkpoint(base)), Side(open_checkpoint(evolved))
    tuned: Patch[Values] = oriented(load_patch(patch), old.checkpoint).mapped(StoredValues)
    with resumable_folder(out, overwrite=False, plan=None) as staged:
        unfinished = Unfinished(staged)
        streams, carried = opened(old, new, tuned, prompts, general, unfinished)
        settings = {setting.name: setting for setting in SETTINGS}
        fit(streams, settings)
        outcome = chosen(streams, carried, [NOTHING, *settings])
        unfinished.clear()
        if not outcome.factors:
            raise PortLLMError(f"'{new.checkpoint.name}': no setting is better than no patch: {outcome.numbers}.")
        made = with_appended(replace(tuned, deltas={}, record=None, beside={}), outcome.factors)
        with settled(made, staged.folder) as whole:
            write_patch(staged.folder, whole, base_name=new.checkpoint.name)
    return dict(outcome.numbers)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the adapter, and its row of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (
        ("base", "the old base"),
        ("patch", "its patch"),
        ("evolved", "the new base"),
        ("retrained", "a patch of the new base that was trained on the same labels"),
        ("prompt", "template of the prompts"),
        ("task", "name of the row"),
    ):
        parser.add_argument(f"--{name}", required=True, help=what)
    for name, what in (("text", "unlabeled prompts"), ("anchors", "general text"), ("rows", "labeled rows to score")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the adapter's folder")
    given = parser.parse_args(arguments)
    prompts, _ = read_prompts(given.text, given.prompt.replace("\\n", "\n"), completion=None)
    general = read_texts(given.anchors, "{text}")
    # What is read after the long fit is opened now, so that what is wrong with it is told before.
    read_data(given.rows, load_patch(given.patch))
    load_patch(given.retrained)
    found = carry(given.base, given.patch, given.evolved, prompts, general, given.output)
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    rows[given.task] = {**found, "scored": scored(given)}
    RESULTS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
