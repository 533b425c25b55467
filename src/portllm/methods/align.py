"""Aligned port: what a patch writes to the residual stream is fitted anew, so that the stream is the old specialist's.

No label and no gradient: forward passes of both models over prompts, and ridge regressions of the size of the rank (see
`portllm.methods.refit` and `portllm.methods.tail`). Candidates are fitted on some of the prompts, one is chosen by its
divergence on others, and how often it answers as the old specialist does is counted on the rest.

Source: this project; docs/methods/align.md has formulas, measurements and failures.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import torch
from torch import Tensor

from portllm.methods.add import add
from portllm.methods.choice import choose, on, wilson
from portllm.methods.contract import Comparison, Inputs, Ported, Streams, Writer
from portllm.methods.ranks import Factors, add_to_b, with_appended
from portllm.methods.refit import Sums, crossed
from portllm.methods.tail import balance, balance_move, constant, logit_moves, reduced_rank
from portllm.methods.values import Values, whole
from portllm.patch.delta import LowRankDelta
from portllm.patch.patch import Patch

ADD, REFIT = "add", "refit"
FOLDS = 2
SKETCH = 64
"""Random directions of an input from which those of new factors are combined."""

ANSWER_SHARE = 0.01
"""A token to which the old specialist gives less than this, on average, is no answer."""

MOST_ANSWERS = 64
TAIL_RHO = 0.01
TAIL_RANK = 8
ANCHOR_SHARE = 0.05
"""What a token of general text counts in a correction at the last writer, beside a place of an answer."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A patch for the evolved model, by what it has beside the old one.

    Attributes:
        name: What stands in the record.
        walked: The candidate of the walk that it is built on.
        tail: By module, what is appended; the last writer, or nothing.
    """

    name: str
    walked: str
    tail: Mapping[str, Factors] = field(default_factory=dict)


def align(patch: Patch[Values], inputs: Inputs) -> Ported:
    """The candidate whose answers diverge least from the old specialist's, or a simpler one that is as good."""
    if inputs.streams is None:
        raise ValueError("align was given no streams, which it declares to need")
    start = add(patch, inputs).patch
    streams = inputs.streams(start)
    refit(streams, start)
    candidates = [
        each for walked in (ADD, REFIT) for each in (Candidate(walked, walked), *corrected(streams, start, walked))
    ]
    old_states = streams.last_states(None)
    found = streams.compare({each.name: moved(streams, each) for each in candidates} | {"": old_states})
    gate = float(on(found[""].nats, streams.parts, "choose").mean())
    name = choose([each.name for each in candidates], found, streams.parts)
    chosen = next(each for each in candidates if each.name == name)
    numbers = evidence(found, name, streams) | {"head_gate": gate} | price(streams, chosen)
    rounded = {key: float(f"{value:.6g}") for key, value in numbers.items()}
    return Ported(made(start, streams, chosen), rounded, None if name == ADD else name)


# -- fitting ----------------------------------------------------------------------------------------------------------


def refit(streams: Streams, start: Patch[Values]) -> None:
    """Fit what every writer adds, first to last, with what was fitted before in force."""
    delta_like = next((delta for delta in start.deltas.values() if not delta.is_embedding), None)
    rank = 0 if delta_like is None else delta_like.rank
    for writer in streams.walk([ADD, REFIT]):
        delta = start.deltas.get(writer.module)
        if delta is None:
            if rank and not start.experts:
                writer.put(REFIT, *new_factors(writer, rank))
        elif delta.magnitude is None:
            a = whole(delta.a).float()
            sums, rho = summed(writer, a)
            writer.put(REFIT, a, sums.solve(rho))


def summed(writer: Writer, a: Tensor) -> tuple[Sums, float]:
    """What the regression needs, and the ridge that serves tokens best which it was not fitted on."""
    folds: dict[int, Sums] = {}
    for number, block in enumerate(writer.blocks(REFIT, a)):
        part, fold = Sums.of(block.z.cpu(), block.error.cpu(), block.weight.cpu()), number % FOLDS
        folds[fold] = folds[fold] + part if fold in folds else part
    first, *others = folds.values()
    return sum(others, first), crossed([first, *others])


def new_factors(writer: Writer, rank: int) -> tuple[Tensor, Tensor]:
    """Factors for a writer that the patch leaves alone: the best of a rank among combinations of random directions."""
    seed = int.from_bytes(blake2b(writer.module.encode(), digest_size=7).digest())
    sketch = torch.randn(SKETCH, writer.d_in, generator=torch.Generator().manual_seed(seed)) / writer.d_in**0.5
    sums, rho = summed(writer, sketch)
    change = sums.solve(rho)
    leading = torch.linalg.svd(change @ torch.linalg.cholesky(sums.zz + ridge_of(sums, rho)), full_matrices=False).U
    kept = leading[:, : min(rank, SKETCH)]
    return (kept.T @ change @ sketch.double()).float(), kept.float()


def ridge_of(sums: Sums, rho: float) -> Tensor:
    """`λ I`, with a little more for directions that no token has."""
    size = float(sums.zz.diagonal().mean())
    return (rho + 1e-12) * max(size, 1e-300) * torch.eye(len(sums.zz), dtype=torch.float64)


def corrected(streams: Streams, start: Patch[Values], walked: str) -> list[Candidate]:
    """The corrections at the last writer of what was walked, the simplest first; none where they are not possible."""
    gain, writer = streams.gain(), streams.last_writer()
    tokens = streams.likely(ANSWER_SHARE)[:MOST_ANSWERS]
    if gain is None or writer is None or len(tokens) < 2 or start.experts:
        return []
    module, scale = writer
    there = start.deltas.get(module)
    if there is not None and there.magnitude is not None:
        return []
    fit = torch.tensor([part == "fit" for part in streams.part_of_place])
    states, u, wanted = streams.last_states(walked), streams.last_inputs(walked)[fit], streams.last_states(None)[fit]
    logits = streams.logits(tokens, states)[fit]
    answers, head, state = streams.logits(tokens, None)[fit], streams.head(tokens), states[fit]
    anchors = streams.anchor_inputs(walked)
    weight = torch.ones(len(u))
    if anchors is not None:  # nothing is to move there
        u = torch.cat([u, anchors])
        weight = torch.cat([weight, torch.full((len(anchors),), ANCHOR_SHARE)])

    def rows(values: Tensor) -> Tensor:
        return torch.cat([values.double(), values.new_zeros(len(u) - len(values), *values.shape[1:]).double()]) / scale

    direction = balance_move(balance(answers.softmax(dim=1), logits), head, gain)
    a = constant(u, rows(state.double().pow(2).mean(dim=1).sqrt()), weight, rho=TAIL_RHO)
    by_logits = rows(logit_moves(answers - logits, head, gain, state))
    tails = {
        "balance": Factors(a[None].float(), direction[:, None].float()),
        "logits": reduced_rank(u, by_logits, weight, rank=min(TAIL_RANK, len(tokens) - 1), rho=TAIL_RHO),
        "states": reduced_rank(u, rows(wanted - state), weight, rank=TAIL_RANK, rho=TAIL_RHO),
    }
    return [Candidate(f"{walked} + {name}", walked, {module: tail}) for name, tail in tails.items()]


def moved(streams: Streams, candidate: Candidate) -> Tensor:
    """The states of a candidate behind the last layer."""
    state, writer = streams.last_states(candidate.walked), streams.last_writer()
    for tail in candidate.tail.values():
        scale = 1.0 if writer is None else writer[1]
        u = streams.last_inputs(candidate.walked)
        state = state + scale * u @ tail.a.T.float() @ tail.b.T.float()
    return state


def made(start: Patch[Values], streams: Streams, candidate: Candidate) -> Patch[Values]:
    """A candidate as a patch."""
    deltas: dict[str, LowRankDelta[Values]] = dict(start.deltas)
    more = dict(candidate.tail)
    for module, (a, b) in streams.put_by(candidate.walked).items():
        if module in deltas:
            deltas[module] = add_to_b(deltas[module], b)
        else:
            more[module] = Factors(a, b) if module not in more else more[module].beside(Factors(a, b))
    patch = replace(start, deltas=deltas)
    return with_appended(patch, more) if more else patch


# -- what is said of it -----------------------------------------------------------------------------------------------


def evidence(found: Mapping[str, Comparison], chosen: str, streams: Streams) -> dict[str, float]:
    """How the answers of the choice and of plain addition compare with the old specialist's, on unseen prompts."""
    parts = streams.parts
    numbers: dict[str, float] = {f"prompts_{part}": float(parts.count(part)) for part in ("fit", "choose", "report")}
    for name, said in ((chosen, ""), (ADD, "_added")):
        agrees = on(found[name].agrees, parts, "report")
        low, high = wilson(int(agrees.sum()), len(agrees))
        numbers |= {
            f"agreement{said}": float(agrees.double().mean()),
            f"agreement{said}_low": low,
            f"agreement{said}_high": high,
            f"divergence{said}": float(on(found[name].nats, parts, "report").mean()),
            f"divergence{said}_chosen_by": float(on(found[name].nats, parts, "choose").mean()),
        }
    return numbers


def price(streams: Streams, chosen: Candidate) -> dict[str, float]:
    """Nats a token on general text: of the bare evolved model, by addition, and by the choice."""
    tail = {module: (factors.a, factors.b) for module, factors in chosen.tail.items()}
    nats = streams.general_nats({"": (None, {}), "_added": (ADD, {}), "_ported": (chosen.walked, tail)})
    return {f"general_nats{name}": float(values.mean()) for name, values in nats.items()}
