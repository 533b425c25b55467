"""What a model writes while one layer at a time is in memory; keys and values of tokens before are kept by layer."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from portllm.arrays import Float32, Int64
from portllm.foreign import DynamicCache
from portllm.progress import Progress, silent
from portllm.running.encoding import PaddedBatch, batches, pad_left
from portllm.running.layers import LayeredModel, NewTokens
from portllm.running.spool import Spool, give_back_freed

Pick = Callable[[Float32[Tensor, "rows vocabulary"]], Int64[Tensor, " rows"]]
"""The next token of each row, from its logits."""

KEPT_BYTES = 1 << 30
SPOOLED_BYTES = 1 << 33
"""Of keys and values at a time, on an accelerator and on disk, were every head to have its own; for further prompts the
layers are read again."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a model wrote.

    Attributes:
        ids: After each prompt.
        states: Behind the last layer, from which each token was picked; text after text.
    """

    ids: list[tuple[int, ...]]
    states: Float32[Tensor, "tokens width"]


class _Kept:
    """Keys and values of one layer, in the place of transformers' cache of all layers.

    Args:
        spool: Where they lie.
        key: Under what.
        most: Tokens of a row, at most.
    """

    def __init__(self, spool: Spool, key: tuple[int, ...], most: int) -> None:
        self._spool, self._key, self._most, self._n_before = spool, key, most, 0

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Take in those of the newest tokens; those of all."""
        start, self._n_before = self._n_before, self._n_before + keys.shape[-2]
        return self._all("keys", keys, start), self._all("values", values, start)

    def _all(self, side: str, new: Tensor, start: int) -> Tensor:
        *rows, n_new, width = new.shape
        room = self._spool.room((side, *self._key), *rows, self._most, width, device=new.device)
        room[..., start : start + n_new, :] = new
        return room[..., : start + n_new, :]


class _Group:
    """Rows that are written together."""

    def __init__(self, rows: list[int], padded: PaddedBatch) -> None:
        self.rows, self.ids, self.n_before = rows, padded.ids, 0
        self.tokens = NewTokens(padded.mask, padded.positions)
        self.kept: list[_Kept] = []

    def go_on(self, ids: Int64[Tensor, " rows"]) -> None:
        """The newest token of each row."""
        self.n_before += self.ids.shape[1]
        self.ids = ids[:, None]
        mask = torch.cat([self.tokens.mask, torch.ones_like(self.ids)], dim=1)
        self.tokens = NewTokens(mask, self.tokens.positions[:, -1:] + 1)


@torch.no_grad()
def write_layered(
    model: LayeredModel,
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    ends: Collection[int],
    pick: Pick,
    batch_size: int,
    spool: Spool,
    progress: Progress = silent,
) -> Written:
    """The tokens that a model writes after each prompt, with the end mark where it comes to one.

    Args:
        model: The model.
        prompts: Ids of each.
        most: Tokens written, at most.
        ends: Tokens that end a text.
        pick: The next tokens.
        batch_size: Prompts of a pass.
        spool: Where keys and values lie.
        progress: Told of the tokens written.
    """
    groups = (
        _Group(batch, pad_left([prompts[row] for row in batch], device=model.device))
        for batch in batches(list(map(len, prompts)), batch_size=batch_size)
    )
    written: list[list[int]] = [[] for _ in prompts]
    states: list[list[Tensor]] = [[] for _ in prompts]
    together = _together(model, groups, most)
    n_turns = len(together)
    for turn, several in enumerate(together):
        for place, group in enumerate(several):
            n_tokens = group.ids.shape[1] + most
            group.kept = [_Kept(spool, (place, number), n_tokens) for number in range(len(model.layers))]
        for number in range(most):
            last = _step(model, several)
            sizes = [len(group.rows) for group in several]
            parts = zip(torch.split(last.cpu(), sizes), torch.split(model.logits(last), sizes), strict=True)
            for group, (behind, logits) in zip(several, parts, strict=True):
                tokens = pick(logits)
                for row, state, token in zip(group.rows, behind, tokens.tolist(), strict=True):
                    if not (written[row] and written[row][-1] in ends):
                        written[row].append(token)
                        states[row].append(state)
                group.go_on(tokens.to(model.device))
            progress("write answers", turn * most + number + 1, n_turns * most, "steps")
            several = [group for group in several if any(written[row][-1] not in ends for row in group.rows)]
            if not several:
                progress("write answers", (turn + 1) * most, n_turns * most, "steps")
                break
    return Written([tuple(tokens) for tokens in written], torch.stack([state for row in states for state in row]))


def _together(model: LayeredModel, groups: Iterable[_Group], most: int) -> list[list[_Group]]:
    """Groups that go through the layers at once: as many as there is room for keys and values of."""
    by_token = 2 * len(model.layers) * model.width * torch.float32.itemsize  # at most: heads may share them
    most_bytes = SPOOLED_BYTES if model.device.type == "cpu" else KEPT_BYTES
    together: list[list[_Group]] = [[]]
    n_bytes = 0
    for group in groups:
        own = by_token * len(group.rows) * (group.ids.shape[1] + most)
        if together[-1] and n_bytes + own > most_bytes:
            together.append([])
            n_bytes = 0
        together[-1].append(group)
        n_bytes += own
    return together


def _step(model: LayeredModel, groups: Sequence[_Group]) -> Float32[Tensor, "rows width"]:
    """The newest tokens of all groups through all layers; the last one's state of each row."""
    states, given, is_first = [], [], not any(group.n_before for group in groups)
    for group in groups:
        embedded = model.embed(group.ids.flatten()).view(*group.ids.shape, -1)
        cache = _stand_in(model, group)
        states.append(model.begin(group.tokens, embedded, cache=cache))
        arguments = model.arguments(group.tokens, cache=cache)
        given.append([each.replaced(cache, kept) for each, kept in zip(arguments, group.kept, strict=True)])
    for number in range(len(model.layers)):
        with model.filled(number):
            states = [model.run(number, state, each[number]) for state, each in zip(states, given, strict=True)]
        if is_first:
            give_back_freed()
    return torch.cat([state[:, -1] for state in states])


def _stand_in(model: LayeredModel, group: _Group) -> DynamicCache:
    """A cache that says how many tokens there were before, for masks; it holds nothing of them."""
    cache = DynamicCache()
    if group.n_before:
        nothing = torch.zeros(len(group.rows), 1, group.n_before, 1, device=model.device)
        for number in range(len(model.layers)):
            cache.update(nothing, nothing, number)
    return cache
