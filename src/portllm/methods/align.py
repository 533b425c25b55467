"""Aligned port: on prompts, the update is undone and the rest is fitted, so that states are the old specialist's.

No label and no gradient: forward passes of both models over prompts, and ridge regressions of the size of the rank (see
`portllm.methods.undoing`, `portllm.methods.refit` and `portllm.methods.tail`). Candidates are fitted on some of the
prompts, one is chosen by its distance from the old specialist on others, and how often it answers as the old specialist
does is counted on the rest.

Source: this project; docs/methods/align.md has formulas and failures, docs/align-measured.md what was measured.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from portllm.methods.add import add
from portllm.methods.choice import choose, clustered, distance, on, standard_error, weighed, wilson
from portllm.methods.contract import Block, Comparison, Inputs, Kind, Ported, Streams
from portllm.methods.ranks import Factors, add_to_b, with_appended
from portllm.methods.refit import Sums
from portllm.methods.tail import Regression, balance, balance_move, logit_moves
from portllm.methods.undoing import Span, Weighted
from portllm.methods.values import Values, whole
from portllm.patch.delta import LowRankDelta
from portllm.patch.patch import Patch
from portllm.patch.record import Tried

ADD = "add"
OLD_STATES = "the old specialist's states, read by the evolved head"

TAIL_RHO = 0.01
TAIL_RANK = 8
ANCHOR_SHARE = 0.05
"""What a token of general text counts in a correction at the last writer, beside a place of an answer."""

WRITTEN = 8
"""Tokens of an answer, its end included: where they are more on average, answers are compared token by token, too."""


@dataclass(frozen=True, slots=True)
class Refit:
    """How the factors of modules are fitted.

    Attributes:
        rho: Ridge, as a share of the mean square of what A reads.
        omega: What a token of a prompt counts beside one with a token of an answer after it.
        general: What all general text counts, as a share of what all prompts count.
        own: Factors that a module has beside those of the patch.
    """

    rho: float
    omega: float
    general: float
    own: int

    def weights(self, blocks: Sequence[Block]) -> list[Tensor]:
        """What each token counts, block by block, given all blocks of a module.

        Example:
            >>> texts = Block(torch.ones(4, 1), torch.ones(4, 1), torch.tensor([0, 1, 2, 3]), torch.ones(4))
            >>> Refit(rho=1.0, omega=0.25, general=0.5, own=48).weights([texts])
            [tensor([0.0000, 0.2500, 1.0000, 0.6250])]
        """
        domain = [torch.tensor([0.0, self.omega, 1.0, 0.0])[block.kind] * block.factor for block in blocks]
        general = [(block.kind == Kind.GENERAL) * block.factor for block in blocks]
        of_domain, of_general = (float(sum(each.sum(dtype=torch.float64) for each in of)) for of in (domain, general))
        token = self.general * of_domain / of_general if of_general else 0.0
        return [one + token * other for one, other in zip(domain, general, strict=True)]


OMEGA = 0.05
SETTINGS = ((1.0, 0.1, 48), (3.0, 0.5, 112), (3.0, 2.0, 112), (3.0, 4.0, 112))
"""Ridge; what general text counts, of which more means that less is moved; and own factors, of which more cost less
there."""

SPARED = 8
"""Of the own factors, at most, where modules then have half the rank in a server, which takes powers of two."""


def refits(rank: int) -> dict[str, Refit]:
    """The refits of a patch, by name, in the order in which they are tried.

    What moves most is first: it is nearest to the old specialist and dearest.

    Args:
        rank: Of the patch; a correction comes beside it.

    Example:
        >>> {rank: [each.own for each in refits(rank).values()] for rank in (8, 16, 32)}
        {8: [48, 112, 112, 112], 16: [40, 104, 104, 104], 32: [48, 112, 112, 112]}
    """
    found: dict[str, Refit] = {}
    for rho, general, most in SETTINGS:
        whole = rank + most + TAIL_RANK
        beyond = whole - (1 << (whole.bit_length() - 1))
        own = most - beyond if beyond <= SPARED else most
        found[f"refit rho={rho} omega={OMEGA} general={general} own={own}"] = Refit(rho, OMEGA, general, own)
    return found


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

    @property
    def as_run(self) -> tuple[str, Mapping[str, tuple[Tensor, Tensor]]]:
        """As `Streams.nats` takes it."""
        return self.walked, {module: (factors.a, factors.b) for module, factors in self.tail.items()}


def align(patch: Patch[Values], inputs: Inputs) -> Ported:
    """The candidate whose answers are nearest to the old specialist's, or a simpler one that is as good."""
    if inputs.streams is None:
        raise ValueError("align was given no streams, which it declares to need")
    start = add(patch, inputs).patch
    streams = inputs.streams(start)
    found, chosen, tried = climbed(streams, start)
    read = streams.compare({OLD_STATES: streams.last_states(None)})[OLD_STATES]
    gate = float(_by(read.nats, streams).mean())
    numbers = evidence(found, chosen.name, streams) | {"head_gate": gate}
    told = {"": (None, {}), "_added": (ADD, {}), "_ported": chosen.as_run}
    price = costs(streams.nats("price", told), "general_nats")
    numbers |= price | {"general_nats_limit": streams.most_nats} if price else {}
    numbers |= costs(streams.nats("judge", told), "loss")
    rounded = {key: float(f"{value:.6g}") for key, value in numbers.items()}
    return Ported(made(start, streams, chosen), rounded, None if chosen.name == ADD else chosen.name, tried)


Climbed = tuple[Mapping[str, Comparison], Candidate, tuple[Tried, ...]]
"""What was found of candidates, the one that is taken, and what stands in the record of all."""


def climbed(streams: Streams, start: Patch[Values]) -> Climbed:
    """Try one refit after the other, until one is chosen or what is wanted is reached.

    Where the best of a refit costs too much, and only a worse one of it can be taken, the next is tried, too: it costs
    less, and may be nearer with a correction than this one without.

    Where a share of answers is wanted, addition and its corrections are tried first. Else addition is compared as it
    is, and its corrections are tried last: they take another pass over the rows to fit on.
    """
    fits = refits(max((delta.rank for delta in start.deltas.values() if not delta.is_embedding), default=0))
    walks = deque([*fits, ADD] if streams.wanted is None else [ADD, *fits])
    candidates: dict[str, Candidate] = {}
    found: dict[str, Comparison] = {}
    limit: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    while True:
        walk = walks.popleft()
        beside = [ADD] if walk != ADD and not found else []
        turn = "addition" if walk == ADD else f"refit {list(fits).index(walk) + 1} of up to {len(fits)}"
        refit(streams, start, walk, fits.get(walk), beside, label=f"align, {turn}")
        new = [*(Candidate(name, name) for name in (*beside, walk)), *corrected(streams, start, walk)]
        as_run = {each.name: each.as_run for each in new}
        found |= streams.compare({each.name: moved(streams, each) for each in new})
        limit |= streams.nats("limit", as_run)
        rows |= streams.nats("judge", as_run) or {name: distance(_by(found[name].nats, streams)) for name in as_run}
        candidates |= {each.name: each for each in new}
        rows = dict(sorted(rows.items(), key=lambda each: candidates[each[0]].walked != ADD))  # the simplest first
        beyond = beyond_addition(limit)
        costly = {name for name, nats in beyond.items() if too_dear(nats, streams.most_nats)}
        chosen = candidates[choose({name: values for name, values in rows.items() if name not in costly})]
        share = float(_by(kept(found[chosen.name], streams), streams).mean())
        is_enough = streams.wanted is not None and share >= streams.wanted
        if list(walks) == [ADD] and not takes_corrections(streams, start):
            walks.clear()
        is_cut = choose({name: rows[name] for name in as_run if candidates[name].walked == walk}) in costly
        is_last = not walks or (chosen.walked != ADD and (walks[0] == ADD or not is_cut))
        if is_enough or is_last:
            return found, chosen, weighed(rows, beyond, costly)


def is_written(streams: Streams) -> bool:
    """Whether answers are text, which hardly any other model writes to the last token alike, and not labels."""
    return len(streams.part_of_place) > WRITTEN * len(streams.parts)


def kept(compared: Comparison, streams: Streams) -> Tensor:
    """How much of each old answer a model gives: all of it or nothing, or a share of the tokens of what is written."""
    return compared.alike if is_written(streams) else compared.agrees.double()


def _by(values: Tensor, streams: Streams) -> Tensor:
    """The values of the prompts to choose by."""
    return on(values, streams.compared, "choose")


def beyond_addition(nats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What candidates cost beyond addition on each row of general text.

    Args:
        nats: Per token, of each candidate on each row; of none where there is no such text.

    Example:
        >>> beyond_addition({"add": torch.tensor([4.0, 4.0]), "refit": torch.tensor([4.0, 4.5])})
        {'add': tensor([0., 0.]), 'refit': tensor([0.0000, 0.5000])}
    """
    return {name: rows - nats[ADD] for name, rows in nats.items()}


def too_dear(beyond: Tensor, most: float) -> bool:
    """Whether the mean cost over rows and its standard error are more than is allowed.

    The error counts, since of many candidates near the limit those pass that happen to cost less on these rows.

    Example:
        >>> [too_dear(torch.tensor([0.0, 0.06]).double(), most) for most in (0.05, 0.07)]
        [True, False]
    """
    return float(beyond.mean()) + standard_error(beyond) > most


# -- fitting ----------------------------------------------------------------------------------------------------------


def refit(
    streams: Streams, start: Patch[Values], name: str, how: Refit | None, beside: Sequence[str], *, label: str
) -> None:
    """Fit what every module adds for a candidate, first to last, with what was fitted before in force.

    It has factors beside the patch's: they undo the update there as far as they can, and are fitted from there on.

    Args:
        streams: What both models say.
        start: The patch, as it was added.
        name: Of the candidate.
        how: How it is fitted; None for what is added alone.
        beside: Candidates that are run as they are.
        label: Of the progress.
    """
    like = next((delta for delta in start.deltas.values() if not delta.is_embedding), None)
    span: Span | None = None
    for fitting in streams.walk([name], beside, label=label):
        delta = start.deltas.get(fitting.module)
        if how is None or (delta is None and (like is None or start.experts)):
            continue
        if delta is not None and delta.magnitude is not None:
            continue
        reads = None if delta is None else whole(delta.a).float()
        count = how.own + (like.rank if delta is None and like else 0)
        again = fitting.same_inputs
        blocks = [_on_cpu(block) for block in fitting.blocks()]
        weights = how.weights(blocks)
        span = span if span is not None and again else spanned(blocks, weights)
        fitting.put(fitted(blocks, weights, how.rho, reads, span.undoing(fitting.drift(), count)))


def spanned(blocks: Sequence[Block], weights: Sequence[Tensor]) -> Span:
    """What a module is given, as what undoes the update there takes it: the domain apart from general text."""
    domain: list[Weighted] = []
    general: list[Weighted] = []
    for block, weight in zip(blocks, weights, strict=True):
        is_general = block.kind == Kind.GENERAL
        for side, counts in ((domain, weight * ~is_general), (general, weight * is_general)):
            if counts.any():  # a batch is of one side; its sums for the other one would be zeros
                side.append(Weighted(block.x, counts))
    return Span.of(domain, general)


def fitted(
    blocks: Sequence[Block], weights: Sequence[Tensor], rho: float, reads: Tensor | None, own: Factors
) -> Factors:
    """What a module adds, of factors that it has beside the patch's, and of B fitted to both.

    Args:
        blocks: What it is given, and lacks with the patch as it was added.
        weights: What each token counts.
        rho: Ridge, as a share of the mean square of what A reads.
        reads: The patch's A; None where the patch leaves the module alone.
        own: Further factors, whose B is fitted from what it is; A is scaled to read as much as the patch's.
    """
    a = own.a if reads is None else torch.cat([reads, own.a])
    n_reads = len(a) - len(own.a)
    read = [block.x @ a.T for block in blocks]
    sizes = torch.cat(read).pow(2).mean(dim=0).sqrt()
    typical = sizes[:n_reads].pow(2).mean().sqrt() if n_reads else 1.0
    scale = torch.ones_like(sizes)
    scale[n_reads:] = torch.where(sizes[n_reads:] > 0, typical / sizes[n_reads:], 1.0)
    b = torch.cat([own.b.new_zeros(len(own.b), n_reads), own.b], dim=1) / scale
    sums = [Sums.of(z * scale, block.error, weight) for z, block, weight in zip(read, blocks, weights, strict=True)]
    change = sum(sums[1:], sums[0]).beyond(b).solve(rho)
    return Factors(a * scale[:, None], b + change.float())


def _on_cpu(block: Block) -> Block:
    return Block(block.x.cpu(), block.error.cpu(), block.kind.cpu(), block.factor.cpu())


def takes_corrections(streams: Streams, start: Patch[Values]) -> bool:
    """Whether something may be added at the last writer: no norm but a plain one is behind it, and answers differ."""
    writer = streams.last_writer()
    if streams.gain() is None or writer is None or len(streams.likely()) < 2 or start.experts:
        return False
    there = start.deltas.get(writer[0])
    return there is None or there.magnitude is None


def corrected(streams: Streams, start: Patch[Values], walked: str) -> list[Candidate]:
    """The corrections at the last writer of what was walked, the simplest first; none where they are not possible."""
    gain, writer = streams.gain(), streams.last_writer()
    if gain is None or writer is None or not takes_corrections(streams, start):
        return []
    module, scale = writer
    tokens = streams.likely()
    fit = torch.tensor([part == "fit" for part in streams.part_of_place])
    states, u, wanted = streams.last_states(walked), streams.last_inputs(walked)[fit], streams.aims()[fit]
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
    regression = Regression.on(u, weight, rho=TAIL_RHO)
    size = regression.fit(rows(state.double().pow(2).mean(dim=1, keepdim=True).sqrt()), rank=1)
    by_logits = rows(logit_moves(answers - logits, head, gain, state))
    tails = {
        "balance": Factors((size.b @ size.a).float(), direction[:, None].float()),
        "logits": regression.fit(by_logits, rank=min(TAIL_RANK, len(tokens) - 1)),
        "states": regression.fit(rows(wanted - state), rank=TAIL_RANK),
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
        rank = 0
        if module in deltas:
            rank = deltas[module].rank
            deltas[module] = add_to_b(deltas[module], b[:, :rank])
        own = Factors(a[rank:], b[:, rank:])
        more[module] = own.beside(more[module]) if module in more else own
    patch = replace(start, deltas=deltas)
    return with_appended(patch, more) if more else patch


# -- what is said of it -----------------------------------------------------------------------------------------------


def evidence(found: Mapping[str, Comparison], chosen: str, streams: Streams) -> dict[str, float]:
    """How the answers of the choice and of plain addition compare with the old specialist's, on unseen prompts.

    `agreement` is the share of prompts whose answers are the same at every place. Of written answers, `token_agreement`
    is the share of tokens that are, mean over prompts.
    """
    parts = streams.parts
    numbers: dict[str, float] = {f"prompts_{part}": float(parts.count(part)) for part in ("fit", "choose", "report")}
    numbers |= {"prompts_drawn": float(len(parts))} if streams.is_drawn else {}
    for name, said in ((chosen, ""), (ADD, "_added")):
        agrees = on(found[name].agrees.double(), streams.compared, "report")
        numbers |= _with_interval(f"agreement{said}", agrees, wilson(float(agrees.sum()), len(agrees)))
        if is_written(streams):
            alike, n_tokens = on(found[name].alike, streams.compared, "report"), streams.part_of_place.count("report")
            numbers |= _with_interval(f"token_agreement{said}", alike, clustered(alike, n_tokens))
        numbers |= {
            f"divergence{said}": float(on(found[name].nats, streams.compared, "report").mean()),
            f"divergence{said}_chosen_by": float(on(found[name].nats, streams.compared, "choose").mean()),
        }
    return numbers


def _with_interval(name: str, shares: Tensor, interval: tuple[float, float]) -> dict[str, float]:
    return {name: float(shares.mean()), f"{name}_low": interval[0], f"{name}_high": interval[1]}


def costs(nats: Mapping[str, Tensor], name: str) -> dict[str, float]:
    """Nats a token on some rows, as the record says them.

    Args:
        nats: What each row costs what the port is compared with (""), the patch as it was added ("_added"), and the
            port ("_ported"); nothing where there are no such rows.
        name: Of the numbers; `error` is the standard error of what the port costs beyond addition.

    Example:
        >>> bare = torch.tensor([4.0, 5.0]).double()
        >>> costs({"": bare, "_added": bare + 0.5, "_ported": bare + 0.75}, "nats")
        {'nats_rows': 2.0, 'nats_error': 0.0, 'nats': 4.5, 'nats_added': 5.0, 'nats_ported': 5.25}
    """
    if not nats:
        return {}
    beyond = nats["_ported"] - nats["_added"]
    told = {f"{name}{which}": float(values.mean()) for which, values in nats.items()}
    return {f"{name}_rows": float(len(beyond)), f"{name}_error": standard_error(beyond)} | told
