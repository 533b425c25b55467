"""What a method is given for one port, and how what it gives becomes tensors on disk."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from portllm.capturing.stored_values import StoredValues, stacked
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import require_equal
from portllm.checkpoint.open import on_disk
from portllm.matching.added_tokens import sized, with_own_rows
from portllm.matching.changes import changes_of, oriented
from portllm.matching.compatibility import taken_tie
from portllm.matching.port_plan import PortPlan
from portllm.matching.token_rows import following, token_changes
from portllm.methods.contract import Inputs, Need, Pair, Streams
from portllm.methods.values import Computed, Values, summed, take_columns, take_rows
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.delta import WholeValue
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from portllm.porting.domain import Domain
    from portllm.porting.unfinished import Unfinished


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
    patch: Patch[Values] = with_own_rows(
        plan.carried.mapped(StoredValues), plan.own_rows, stacked, plan.base or plan.evolved
    )
    by_token = _by_token(plan)
    if plan.tokens is not None:
        patch = following(patch, by_token, plan.tokens, _take)
    needs = plan.method.needs_for(patch)
    needs_weights = Need.WEIGHTS in needs
    run = Inputs(
        streams=_streams(plan, domain, unfinished) if Need.STREAMS in needs else None,
        pairs=_pairs(plan, domain, unfinished) if Need.PAIRS in needs else None,
    )
    if plan.base is None or not (needs_weights or by_token):
        return patch, run
    models = on_disk(plan.base), on_disk(plan.evolved)
    require_equal(taken for model in models for taken in taken_tie(plan.carried, model))
    if not needs_weights:
        return patch, run
    base, evolved = (_weights(patch, model) for model in models)
    by_token = [name for name in by_token if name in base]  # rows of tokens that are all gone are no part of it
    if plan.carried_tokens is not None:
        own = plan.carried_tokens
        base |= {name: take_rows(base[name], own.base_rows()) for name in by_token}
        evolved |= {
            name: take_rows(side, own.evolved_rows(side.shape[0])) for name, side in evolved.items() if name in by_token
        }
    elif plan.tokens is not None:
        base |= {name: take_rows(base[name], plan.tokens.rows) for name in by_token}
    return patch, replace(run, base=base, evolved=evolved)


def _streams(
    plan: PortPlan, domain: "Domain | None", unfinished: "Unfinished | None"
) -> "Callable[[Patch[Values]], Streams]":
    """What opens both models over the prompts, given the patch as it is added."""
    from portllm.porting.domain import open_streams  # loads transformers, which most ports do without

    ready = _to_run(plan, domain, unfinished)
    return lambda added: open_streams(*ready, added)


def _pairs(
    plan: PortPlan, domain: "Domain | None", unfinished: "Unfinished | None"
) -> "Callable[[Collection[str]], Iterator[Pair]]":
    """What runs both models without the patch, given the modules to be looked at."""
    from portllm.porting.domain import open_pairs

    ready = _to_run(plan, domain, unfinished)
    return lambda modules: open_pairs(*ready).over(modules)


def _to_run(
    plan: PortPlan, domain: "Domain | None", unfinished: "Unfinished | None"
) -> "tuple[PortPlan, Patch[Values], Domain, Unfinished]":
    if domain is None or unfinished is None or plan.base is None:
        raise AssertionError("a plan whose method runs the models was checked for prompts and base")
    models = replace(plan, base=on_disk(plan.base), evolved=on_disk(plan.evolved))
    return models, oriented(plan.patch, plan.base).mapped(StoredValues), domain, unfinished


def with_own(plan: PortPlan, ported: Patch[Values]) -> Patch[Values]:
    """The ported patch with what only the patch has, as it is: heads, and rows under the factors of an embedding."""
    own: dict[str, WholeValue[Values]] = {
        name: WholeValue(StoredValues(plan.patch.values[name].values)) for name in plan.own
    }
    tokens = plan.carried_tokens
    resized: dict[str, Values] = {}
    if tokens is not None:
        for name, weight in ported.resized.items():
            evolved = StoredValues(plan.evolved.tensor(name) or plan.evolved.info(name))
            kept = take_rows(evolved, tokens.evolved_rows(evolved.shape[0]))
            resized[name] = summed(kept, take_rows(weight, tokens.own_rows()))
    values = dict(sorted({**ported.values, **own}.items()))
    return replace(ported, values=values, resized=resized, beside=plan.beside.files)


def _by_token(plan: PortPlan) -> list[str]:
    return [] if plan.tokens is None or plan.base is None else token_changes(_planned(plan), plan.base)


def _planned(plan: PortPlan) -> Patch[TensorInfo]:
    """What the method carries, with rows of its own tokens, of which only the shapes are asked."""
    return with_own_rows(plan.carried, plan.own_rows, sized, plan.base or plan.evolved)


def _take(values: Values, rows: Sequence[int], axis: int) -> Values:
    return (take_columns if axis else take_rows)(values, rows)


def _weights(patch: Patch[Values], model: Checkpoint) -> dict[str, Values]:
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

        from portllm.tensors.tensors import load

        return torch.stack([torch.cat([load(info) for info in matrices]) for matrices in experts[start:stop]])

    return Computed(name, shape, rows)


def left_out(plan: PortPlan) -> dict[str, tuple[str, ...]]:
    """By tensor, the tokens whose change is dropped, for the evolved model does not have them."""
    if plan.tokens is None or plan.base is None:
        return {}
    gone = plan.tokens.gone
    lost: dict[str, tuple[str, ...]] = {}
    for name in _by_token(plan):
        is_changed = _row_change(_planned(plan), name, plan.base)
        lost[name] = tuple(token for row, token in gone.items() if is_changed(row))
    return {name: tokens for name, tokens in lost.items() if tokens}


def _row_change(patch: Patch[TensorInfo], name: str, base: Checkpoint) -> Callable[[int], bool]:
    """Whether a patch changes a row of a tensor that has one for each token."""
    from portllm.tensors.tensors import load, load_rows

    if name in patch.rows:
        return set(patch.rows[name].rows).__contains__
    if name in patch.values:
        before, tuned = base.tensor(name) or base.info(name), patch.values[name].values
        return lambda row: not load_rows(tuned, row, row + 1).double().equal(load_rows(before, row, row + 1).double())
    delta = patch.deltas[name.removesuffix(WEIGHT)]
    by_row = load(delta.a).T if delta.is_embedding else load(delta.b)
    return lambda row: bool(by_row[row].any())
