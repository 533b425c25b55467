"""What both models read in an aligned port: prompts of the domain that a patch is for, and general text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.errors import DataError
from portllm.matching.port_plan import PortPlan
from portllm.methods.contract import Part
from portllm.methods.values import Values
from portllm.patch.patch import Patch
from portllm.porting.drawn import Drawn, draw
from portllm.porting.pairs import Pairs
from portllm.porting.prompts import Ids, Rows, split
from portllm.porting.reading import Reading
from portllm.porting.streams import Streams
from portllm.porting.unfinished import Unfinished
from portllm.porting.weights import PatchedWeights
from portllm.progress import Progress, silent
from portllm.running.encoding import Encoder, encode_prompts, encode_rows
from portllm.running.examples import Border, Example
from portllm.running.folder import model_folder
from portllm.running.layers import LayeredModel
from portllm.running.model import Device, choose_device, load_tokenizer
from portllm.running.ranges import require_ranges
from portllm.running.spool import Spool
from portllm.running.writing import Written, write_layered

LEAST_PROMPTS = 16
"""A quarter of them is reported on."""

LEAST_JUDGES = 8
"""Rows with answers to choose by."""

ANCHORS = 96
ANCHOR_TOKENS = 48
"""General text that is read: rows, and tokens of each at most."""

GENERAL: tuple[Part, ...] = ("anchor", "limit", "price")
"""What these rows are for, in turn."""

GENERAL_SHARE = 0.25
"""Tokens of general text to fit on, beside those of the prompts. Where these are long there are further rows for it,
since a few would be fitted to the letter."""

WRITTEN_TOKENS = 32
"""Of a row that the evolved model writes itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """Prompts of the domain that a patch is for, and how they are run.

    Attributes:
        prompts: As they would be given to the model; nobody has to answer them. Or how the old specialist draws some.
        answered: Rows with right answers, by which the choice is made; those whose prompts are fitted or reported on
            are left out. None for a choice by the old specialist's answers.
        border: How answers follow the prompts.
        anchors: General text, on which the evolved model is to stay as it is; None for text that it writes itself, no
            rows for none.
        max_tokens: Of a prompt and its answer, at most; longer prompts are cut from the left.
        answer_tokens: Of an answer, at most.
        batch_size: Prompts of a forward pass.
        device: Where layers run.
        seed: Of the text that the evolved model writes.
        most_nats: What a port may cost beyond addition, in nats per token of general text, standard error included.
        wanted: Share of answers that are to be the old specialist's, above which nothing more is tried; None for the
            most that can be had.
        progress: Progress callback (tokens written, layers).

    Raises:
        DataError: There are too few prompts to split them in three.
        PortLLMError: A setting is out of its range.
    """

    prompts: Sequence[str] | Drawn
    answered: Sequence[Example] = ()
    border: Border | None = None
    anchors: Sequence[str] | None = None
    max_tokens: int = 512
    answer_tokens: int = 32
    batch_size: int = 16
    device: Device = "auto"
    seed: int = 0
    most_nats: float = 0.05
    wanted: float | None = None
    progress: Progress = silent

    @property
    def identity(self) -> dict[str, object]:
        """All that a result depends on."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "progress"}

    def __post_init__(self) -> None:
        least = self.answer_tokens + 2
        require_ranges(
            "text settings",
            ("max_tokens", self.max_tokens, f"{least} or more", self.max_tokens >= least),
            ("answer_tokens", self.answer_tokens, "1 or more", self.answer_tokens >= 1),
            ("batch_size", self.batch_size, "1 or more", self.batch_size >= 1),
            ("most_nats", self.most_nats, "0 or more", self.most_nats >= 0),
        )
        _require_enough(self.prompts.count if isinstance(self.prompts, Drawn) else len(set(self.prompts)), "given")


def _require_enough(n: int, what: str) -> None:
    if n < LEAST_PROMPTS:
        raise DataError(
            f"prompts: {n} different ones were {what}; expected at least {LEAST_PROMPTS}, better 256: they are split "
            "into those to fit on, to choose by and to report on."
        )


def open_streams(
    plan: PortPlan, patch: Patch[Values], domain: Domain, unfinished: Unfinished, added: Patch[Values]
) -> Streams:
    """Both models over the prompts of a domain, with the old specialist's answers, and over general text.

    Args:
        plan: Names the models.
        patch: The patch of the base, with its deltas the way round in which the base stores its weights.
        domain: What is read.
        unfinished: What an earlier run of the same plan has done.
        added: The patch of the evolved model, as plain addition makes it.

    Raises:
        CheckpointError: A model cannot be run layer by layer.
        DataError: A prompt has no tokens, too few were drawn, or no row with an answer is left to choose by.
    """
    new = _model(plan.evolved, added, domain)
    asked, *others = _readings(plan, patch, domain, unfinished)
    return Streams(
        new,
        asked,
        others,
        domain.progress,
        unfinished,
        most_nats=domain.most_nats,
        wanted=domain.wanted,
        is_drawn=isinstance(domain.prompts, Drawn),
    )


def open_pairs(plan: PortPlan, patch: Patch[Values], domain: Domain, unfinished: Unfinished) -> Pairs:
    """Both models, without the patch, over the same text; as for `open_streams`."""
    if plan.base is None:
        raise AssertionError("a plan with pairs has a base")
    readings = _readings(plan, patch, domain, unfinished)
    base, evolved = (_model(model, None, domain) for model in (plan.base, plan.evolved))
    return Pairs(base, evolved, [reading for reading in readings if reading.to_fit], domain.progress)


def _model(checkpoint: Checkpoint, change: Patch[Values] | None, domain: Domain) -> LayeredModel:
    """A model, with a patch or bare."""
    folder, device = model_folder(checkpoint, progress=domain.progress), choose_device(domain.device)
    return LayeredModel(folder, PatchedWeights(checkpoint, change), device=device, longest=domain.max_tokens)


def _readings(plan: PortPlan, patch: Patch[Values], domain: Domain, unfinished: Unfinished) -> list[Reading]:
    """What is read and by whom: prompts first, by the old specialist; general text, by the bare evolved model."""
    if plan.base is None:
        raise AssertionError("a plan that reads prompts has a base")
    old, bare = _model(plan.base, patch, domain), _model(plan.evolved, None, domain)
    encoder = Encoder(load_tokenizer(model_folder(plan.base, progress=domain.progress)), domain.border)
    texts = _texts(old, encoder, domain, unfinished)
    prompts, _ = encode_prompts(encoder, texts, room=domain.max_tokens - domain.answer_tokens)
    answers = unfinished.written("answers", lambda: _answers(old, prompts, encoder, domain, unfinished.spool()))
    asked = Rows.answered(prompts, answers.ids, split(texts))
    general, last = _general(bare, encoder, domain, unfinished, most=_n_general(asked))
    rows = [
        (old, asked, answers.states),
        *((old, each, None) for each in _judges(texts, encoder, domain)),
        (bare, Rows.answered([row[:1] for row in general], [row[1:] for row in general], _dealt(len(general))), last),
    ]
    changed = frozenset(patch.deltas)
    return [
        Reading(each, model, changed, model.device, domain.batch_size, unfinished.spool(), last)
        for model, each, last in rows
        if each.ids
    ]


def _texts(old: LayeredModel, encoder: Encoder, domain: Domain, unfinished: Unfinished) -> Sequence[str]:
    """The prompts, those that were given or those that the old specialist draws."""
    drawn = domain.prompts
    if not isinstance(drawn, Drawn):
        return drawn

    def write() -> list[str]:
        how = {"seed": domain.seed, "batch_size": domain.batch_size}
        return draw(old, encoder, drawn, **how, spool=unfinished.spool(), progress=domain.progress)

    texts = unfinished.drawn(write)
    _require_enough(len(texts), "drawn")
    return texts


def _judges(texts: Sequence[str], encoder: Encoder, domain: Domain) -> list[Rows]:
    """The rows with right answers, but those whose prompts are fitted or reported on; nothing where none were given."""
    if not domain.answered:
        return []
    parts = dict(zip(texts, split(texts), strict=True))
    apart = [row for row in domain.answered if parts.get(row.prompt, "choose") == "choose"]
    if len(apart) < LEAST_JUDGES:
        raise DataError(
            f"rows with answers: {len(apart)} are left to choose by, of {len(domain.answered)}; expected at least "
            f"{LEAST_JUDGES} whose prompts are neither fitted nor reported on. Pass more."
        )
    rows = encode_rows(
        apart,
        lambda row: encoder.encode(row.prompt, row.completion, max_tokens=domain.max_tokens, reserve=1),
        max_tokens=domain.max_tokens,
    )
    said = [row.completion if row.completion[-1] in encoder.stops else (*row.completion, encoder.end) for row in rows]
    return [Rows.answered([row.prompt for row in rows], said, tuple("judge" for _ in rows))]


def _answers(model: LayeredModel, prompts: Sequence[Ids], encoder: Encoder, domain: Domain, spool: Spool) -> Written:
    """What the old specialist says to each prompt, always the likeliest token."""
    return write_layered(
        model,
        prompts,
        most=domain.answer_tokens,
        ends=encoder.stops,
        pick=lambda logits: logits.argmax(dim=1),
        batch_size=domain.batch_size,
        spool=spool,
        progress=domain.progress,
    )


def _n_general(asked: Rows) -> int:
    """How many rows of general text there are to be beside some prompts.

    Example:
        >>> [_n_general(Rows.answered([(1,) * 100] * n, [(2,)] * n, ("fit",) * n)) for n in (32, 64)]
        [96, 114]
    """
    to_fit = len(asked.tokens(asked.of(["fit"])))
    more = math.ceil(GENERAL_SHARE * to_fit / WRITTEN_TOKENS) - ANCHORS // len(GENERAL)
    return ANCHORS + max(0, more)


def _dealt(n: int) -> tuple[Part, ...]:
    """What each row of general text is for; further ones are fitted on.

    Example:
        >>> [_dealt(114).count(part) for part in GENERAL]
        [50, 32, 32]
    """
    return tuple(GENERAL[place % len(GENERAL)] if place < ANCHORS else "anchor" for place in range(n))


def _general(
    model: LayeredModel, encoder: Encoder, domain: Domain, unfinished: Unfinished, *, most: int
) -> tuple[list[Ids], Tensor | None]:
    """Rows of general text with two tokens at least; the model's last states before each, where it wrote them."""
    if domain.anchors is not None:
        encoded = (encoder.encode_text(text)[:ANCHOR_TOKENS] for text in domain.anchors)
        return [ids for ids in encoded if len(ids) > 1][:most], None
    generator = torch.Generator().manual_seed(domain.seed)

    def drawn(logits: Tensor) -> Tensor:
        return torch.multinomial(logits.cpu().softmax(dim=1), 1, generator=generator)[:, 0]

    def write() -> Written:
        return write_layered(
            model,
            [(encoder.start,)] * most,
            most=WRITTEN_TOKENS,
            ends=encoder.stops,
            pick=drawn,
            batch_size=ANCHORS,
            spool=unfinished.spool(),
            progress=domain.progress,
        )

    written = unfinished.written("general", write)
    return [(encoder.start, *tokens) for tokens in written.ids], written.states
