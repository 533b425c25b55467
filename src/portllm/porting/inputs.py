"""What a method is given for one port, and how what it gives becomes tensors on disk."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import require_equal
from portllm.checkpoint.open import on_disk
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import NonFiniteError
from portllm.matching.compatibility import changes_of, oriented, taken_tie
from portllm.matching.port_plan import PortPlan
from portllm.matching.token_rows import following, token_changes
from portllm.methods.contract import Inputs, Need, Streams
from portllm.methods.values import Computed, Values, blocks, n_rows_of, take_columns, take_rows
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.patch import Patch

if TYPE_CHECKING:
    from torch import Tensor

    from portllm.checkpoint.reading.spool import Spool
    from portllm.porting.domain import Domain
    from portllm.porting.unfinished import Unfinished


@dataclass(frozen=True, slots=True)
class StoredValues:
    """Values as they lie on disk."""

    info: TensorInfo

    @property
    def name(self) -> str:
        """The tensor's name in its file."""
        return self.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        """As the header says."""
        return self.info.shape

    def rows(self, start: int, stop: int) -> "Tensor":
        """Read these rows."""
        from portllm.checkpoint.reading.tensors import load_rows  # loads torch, which most ports do without

        return load_rows(self.info, start, stop)


def gather(
    plan: PortPlan, domain: "Domain | None" = None, unfinished: "Unfinished | None" = None
) -> tuple[Patch[Values], Inputs]:
    """The patch in the evolved model's vocabulary, and what the plan's method asks for, which is read when it asks.

    Args:
        plan: What is ported.
        domain: Prompts, for a method that runs the models.
        unfinished: What an earlier run of the same plan has done.

    Raises:
        PlanRefusedError: Head and embedding, of which the patch changes one, were taken for equal and are not.
    """
    patch: Patch[Values] = plan.patch.mapped(StoredValues)
    by_token = _by_token(plan)
    if plan.tokens is not None:
        patch = following(patch, by_token, plan.tokens, _take)
    needs = plan.method.needs_for(plan.patch)
    needs_weights = Need.WEIGHTS in needs
    streams = _streams(plan, domain, unfinished) if Need.STREAMS in needs else None
    if plan.base is None or not (needs_weights or by_token):
        return patch, Inputs(streams=streams)
    models = on_disk(plan.base), on_disk(plan.evolved)
    require_equal(taken for model in models for taken in taken_tie(plan.patch, model))
    if not needs_weights:
        return patch, Inputs(streams=streams)
    base, evolved = (_weights(plan.patch, model) for model in models)
    if plan.tokens is not None:
        base |= {name: take_rows(base[name], plan.tokens.rows) for name in by_token}
    return patch, Inputs(base, evolved, streams)


def _streams(
    plan: PortPlan, domain: "Domain | None", unfinished: "Unfinished | None"
) -> "Callable[[Patch[Values]], Streams]":
    """What opens both models over the prompts, given the patch as it is added."""
    from portllm.porting.domain import open_streams  # loads transformers, which most ports do without

    if domain is None or unfinished is None or plan.base is None:
        raise AssertionError("a plan whose method runs the models was checked for prompts and base")
    models = replace(plan, base=on_disk(plan.base), evolved=on_disk(plan.evolved))
    patch: Patch[Values] = oriented(plan.patch, plan.base).mapped(StoredValues)
    return lambda added: open_streams(models, patch, added, domain, unfinished)


def _by_token(plan: PortPlan) -> list[str]:
    return [] if plan.tokens is None or plan.base is None else token_changes(plan.patch, plan.base)


def _take(values: Values, rows: Sequence[int], axis: int) -> Values:
    return (take_columns if axis else take_rows)(values, rows)


def _weights(patch: Patch[TensorInfo], model: Checkpoint) -> dict[str, Values]:
    """What a model has in the place of everything that a patch changes."""
    found: dict[str, Values] = {
        name: StoredValues(model.tensor(name) or model.info(name)) for name in changes_of(patch)
    }
    return found | {
        name: _stack(name, delta.shape, model.experts[model.current_name(name)])
        for name, delta in patch.experts.items()
    }


def _stack(name: str, shape: tuple[int, ...], experts: Sequence[Sequence[TensorInfo]]) -> Computed:
    """The weights of all experts of a layer, one a row, whichever way a file stores them."""

    def rows(start: int, stop: int) -> "Tensor":
        import torch

        from portllm.checkpoint.reading.tensors import load

        return torch.stack([torch.cat([load(info) for info in matrices]) for matrices in experts[start:stop]])

    return Computed(name, shape, rows)


def left_out(plan: PortPlan) -> dict[str, tuple[str, ...]]:
    """By tensor, the tokens whose change is dropped, for the evolved model does not have them."""
    if plan.tokens is None or plan.base is None:
        return {}
    gone = plan.tokens.gone
    lost: dict[str, tuple[str, ...]] = {}
    for name in _by_token(plan):
        is_changed = _row_change(plan.patch, name, plan.base)
        lost[name] = tuple(token for row, token in gone.items() if is_changed(row))
    return {name: tokens for name, tokens in lost.items() if tokens}


def _row_change(patch: Patch[TensorInfo], name: str, base: Checkpoint) -> Callable[[int], bool]:
    """Whether a patch changes a row of a tensor that has one for each token."""
    from portllm.checkpoint.reading.tensors import load, load_rows

    if name in patch.rows:
        return set(patch.rows[name].rows).__contains__
    if name in patch.values:
        before, tuned = base.tensor(name) or base.info(name), patch.values[name].values
        return lambda row: not load_rows(tuned, row, row + 1).double().equal(load_rows(before, row, row + 1).double())
    delta = patch.deltas[name.removesuffix(WEIGHT)]
    by_row = load(delta.a).T if delta.is_embedding else load(delta.b)
    return lambda row: bool(by_row[row].any())


@contextmanager
def settled(patch: Patch[Values], folder: Path) -> Iterator[Patch[TensorInfo]]:
    """The patch with all that is computed put down in a folder, for as long as the block lasts.

    Raises:
        NonFiniteError: A computed value is infinite or not a number.
    """
    with ExitStack() as stack:

        @cache
        def spool() -> "Spool":
            from portllm.checkpoint.reading.spool import SPOOL_FILE, Spool

            return stack.enter_context(Spool(folder / SPOOL_FILE))

        yield patch.mapped(lambda values: values.info if isinstance(values, StoredValues) else _put(values, spool()))


def _put(values: Values, spool: "Spool") -> TensorInfo:
    from portllm.checkpoint.reading.spool import DTYPE_NAMES

    computed = (_finite(values, *block) for block in blocks(n_rows_of(values), math.prod(values.shape[1:])))
    first = next(computed)
    with spool.writing(values.name, DTYPE_NAMES[first.dtype], tuple(values.shape)) as entry:
        for block in chain((first,), computed):
            entry.append_tensor(block)
    return entry.info


def _finite(values: Values, start: int, stop: int) -> "Tensor":
    block = values.rows(start, stop)
    if not block.isfinite().all():
        raise NonFiniteError(
            f"'{values.name}': contains an infinity or NaN after porting. Look for one in the patch and in both "
            "models, and for zero rows under a DoRA magnitude."
        )
    return block
