"""Aligned port: what a patch writes to the residual stream is fitted anew, so that the stream is the old specialist's.

No label and no gradient: forward passes of both models over prompts, and ridge regressions of the size of the rank (see
`portllm.methods.refit` and `portllm.methods.tail`). Candidates are fitted on some of the prompts, one is chosen by its
divergence on others, and how often it answers as the old specialist does is counted on the rest.

Source: this project; docs/methods/align.md has formulas, measurements and failures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from portllm.methods.add import add
from portllm.methods.contract import Comparison, Inputs, Part, Ported, Streams
from portllm.methods.ranks import Factors, add_to_b, with_appended
from portllm.methods.refit import Sums
from portllm.methods.tail import balance, balance_move, constant, logit_moves, reduced_rank
from portllm.methods.values import Values, whole
from portllm.patch.patch import Patch

ADD = "add"
RHOS = (0.1, 0.01)
"""Ridges of the refits, the strongest first: it changes the least."""

ANSWER_SHARE = 0.01
"""A token to which the old specialist gives less than this, on average, is no answer."""

MOST_ANSWERS = 64
TAIL_RHO = 0.01
TAIL_RANK = 8
TAUS = (0.7, 1.0, 1.3)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A patch for the evolved model, by what it has beside the old one.

    Attributes:
        name: What stands in the record.
        walked: The candidate of the walk that it is built on.
        tail: What is appended at the last writer, or None.
    """

    name: str
    walked: str
    tail: Factors | None = None


def align(patch: Patch[Values], inputs: Inputs) -> Ported:
    """The candidate whose answers diverge least from the old specialist's, or a simpler one that is as good."""
    if inputs.streams is None:
        raise ValueError("align was given no streams, which it declares to need")
    start = add(patch, inputs).patch
    streams = inputs.streams(start)
    refits = {f"refit rho={rho}": rho for rho in RHOS}
    walk(streams, start, refits)
    candidates = [Candidate(ADD, ADD), *tails(streams, ADD)]
    for name in refits:
        candidates += [Candidate(name, name), *tails(streams, name)]
    states = {each.name: moved(streams, each) for each in candidates}
    found = streams.compare(states)
    chosen = choose([each.name for each in candidates], found, streams.parts)
    by_name = {each.name: each for each in candidates}
    return Ported(
        made(start, streams, by_name[chosen]), evidence(found, chosen, streams.parts), None if chosen == ADD else chosen
    )


def walk(streams: Streams, start: Patch[Values], refits: Mapping[str, float]) -> None:
    """Fit B of every writer in each refit, first to last, with what was fitted before in force."""
    for writer in streams.walk([ADD, *refits]):
        delta = start.deltas.get(writer.module)
        if delta is None or delta.magnitude is not None:
            continue
        for name, rho in refits.items():
            a = whole(delta.a).float()
            sums = Sums.empty(len(a), delta.b.shape[0])
            for block in writer.blocks(name):
                sums.add(block.x.cpu() @ a.T, block.error.cpu(), block.weight.cpu())
            writer.put(name, a, sums.solve(rho))


def tails(streams: Streams, walked: str) -> list[Candidate]:
    """The corrections at the last writer of what was walked, the simplest first; none where they are not possible."""
    gain, writer = streams.gain, streams.last_writer
    if gain is None or writer is None:
        return []
    tokens = streams.likely(ANSWER_SHARE)[:MOST_ANSWERS]
    if len(tokens) < 2:
        return []
    fit = _places(streams, "fit")
    state, u = streams.last_states(walked), streams.last_inputs(walked)
    wanted, there = streams.logits(tokens, None), streams.logits(tokens, state)
    head, gain = streams.head(tokens).cpu(), gain.cpu()
    state, u, wanted, there = (each.cpu()[fit] for each in (state, u, wanted, there))
    scale = writer[1]

    bias = balance(wanted.softmax(dim=1), there)
    direction = balance_move(bias, head, gain) / scale
    a = constant(u, state.double().pow(2).mean(dim=1).sqrt(), rho=TAIL_RHO)
    found = [
        Candidate(f"{walked} + balance tau={tau}", walked, Factors(a[None], tau * direction[:, None])) for tau in TAUS
    ]
    moves = logit_moves(wanted - there, head, gain, state) / scale
    logits = reduced_rank(u, moves, rank=min(TAIL_RANK, len(tokens) - 1), rho=TAIL_RHO)
    found.append(Candidate(f"{walked} + logits rho={TAIL_RHO}", walked, logits))
    gap = (streams.last_states(None).cpu()[fit] - state) / scale
    found.append(
        Candidate(f"{walked} + states rho={TAIL_RHO}", walked, reduced_rank(u, gap, rank=TAIL_RANK, rho=TAIL_RHO))
    )
    return found


def moved(streams: Streams, candidate: Candidate) -> Tensor:
    """The states of a candidate behind the last layer."""
    state, writer = streams.last_states(candidate.walked), streams.last_writer
    if candidate.tail is None or writer is None:
        return state
    u = streams.last_inputs(candidate.walked).double().cpu()
    return state + (writer[1] * (u @ candidate.tail.a.double().T) @ candidate.tail.b.double().T).to(state)


def choose(names: Sequence[str], found: Mapping[str, Comparison], parts: Sequence[Part]) -> str:
    """The first name that is no worse than the best one by more than one standard error, nor than the first one.

    The error is that of the mean difference of the two on the same prompts.

    Args:
        names: The simplest first.
        found: What was measured of each.
        parts: What each prompt is for; those to choose by are looked at.
    """
    rows = torch.tensor([part == "choose" for part in parts])
    nats = {name: found[name].nats[rows] for name in names}
    best = min(names, key=lambda name: float(nats[name].mean()))

    def is_as_good(name: str) -> bool:
        more = nats[name] - nats[best]
        return float(more.mean()) <= standard_error(more) and float(nats[name].mean()) <= float(nats[names[0]].mean())

    return next(name for name in names if name == best or is_as_good(name))


def standard_error(values: Float64[Tensor, " n"]) -> float:
    """Of a mean: `std / √n`, 0 for a single value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


def made(start: Patch[Values], streams: Streams, candidate: Candidate) -> Patch[Values]:
    """A candidate as a patch."""
    deltas = dict(start.deltas)
    for module, (_, change) in streams.put_by(candidate.walked).items():
        deltas[module] = add_to_b(deltas[module], change)
    patch = replace(start, deltas=deltas)
    if candidate.tail is None or streams.last_writer is None:
        return patch
    return with_appended(patch, {streams.last_writer[0]: candidate.tail})


def evidence(found: Mapping[str, Comparison], chosen: str, parts: Sequence[Part]) -> dict[str, float]:
    """What the record says of a choice."""
    numbers: dict[str, float] = {}
    for part in ("fit", "choose", "report"):
        numbers[f"{part}_prompts"] = float(parts.count(part))  # type: ignore[arg-type]
    for name in dict.fromkeys((ADD, chosen)):
        said = "of_add" if name == ADD else "of_choice"
        for part in ("choose", "report"):
            rows = torch.tensor([each == part for each in parts])
            numbers[f"nats_{said}_{part}"] = float(f"{float(found[name].nats[rows].mean()):.6g}")
        report = torch.tensor([each == "report" for each in parts])
        numbers[f"agreement_{said}"] = float(f"{float(found[name].agrees[report].double().mean()):.6g}")
    return numbers


def _places(streams: Streams, part: Part) -> Tensor:
    rows = torch.tensor([each == part for each in streams.parts])
    return rows[streams.prompt_of_place]
