"""What models say behind their last layer: a block of the vocabulary at a time, and some of the states at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor

from portllm.arrays import Float32, Float64, Int64
from portllm.measures.logit_blocks import Compared, Softmax
from portllm.running.layers import LayeredModel

PLACES = 256
"""Whose logits are in memory at a time, for some thousand tokens of the vocabulary."""


def compare_answers(
    old: LayeredModel,
    wanted: Float32[Tensor, "places width"],
    new: LayeredModel,
    candidates: Mapping[str, Float32[Tensor, "places width"]],
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each candidate and place `KL(old || candidate)` in nats, and whether both find the same token likeliest.

    Args:
        old: The model to be answered as.
        wanted: Its states behind its last layer.
        new: The model that the candidates are of.
        candidates: Their states behind its last layer, by name.
    """
    results = [compared.results() for compared in _compared(old, wanted, new, candidates)]
    together = {name: zip(*(part[name] for part in results), strict=True) for name in candidates}
    return {name: (torch.cat(nats), torch.cat(same)) for name, (nats, same) in together.items()}


def expected_nats(
    bare: LayeredModel,
    wanted: Float32[Tensor, "places width"],
    new: LayeredModel,
    candidates: Mapping[str, Float32[Tensor, "places width"]],
) -> tuple[Float64[Tensor, " places"], dict[str, Float64[Tensor, " places"]]]:
    """What the next token of a model costs it and each candidate: `-Σ p log p`, and `-Σ p log q`, at each place.

    On text that the model wrote, that is the mean over all that it could have written there, without the luck of what
    it did write.

    Args:
        bare: The model whose next tokens these are.
        wanted: Its states behind its last layer.
        new: The model that the candidates are of.
        candidates: Their states behind its last layer, by name.
    """
    parts = _compared(bare, wanted, new, candidates)
    own, results = torch.cat([part.entropy for part in parts]), [part.results() for part in parts]
    return own, {name: own + torch.cat([part[name][0] for part in results]) for name in candidates}


def _compared(old: LayeredModel, wanted: Tensor, new: LayeredModel, candidates: Mapping[str, Tensor]) -> list[Compared]:
    """The candidates beside a model, some places after the other."""
    finished = {name: new.finish(states) for name, states in candidates.items()}
    states = old.finish(wanted)
    parts = torch.split(torch.arange(len(states)), PLACES)
    found = [Compared(len(part), finished, new.device) for part in parts]
    for start, stop in new.head_blocks():
        with old.head(range(start, stop)) as old_logits, new.head(range(start, stop)) as new_logits:
            for part, compared in zip(parts, found, strict=True):
                logits = ((name, new_logits(each[part])) for name, each in finished.items())
                compared.add(start, old_logits(states[part]), logits)
    return found


def mean_shares(model: LayeredModel, states: Float32[Tensor, "places width"]) -> Float64[Tensor, " tokens"]:
    """The probability that a model gives each token, on average over states behind its last layer."""
    parts = torch.split(model.finish(states), PLACES)
    softmaxes = [Softmax(len(part), model.device) for part in parts]
    for start, stop in model.head_blocks():
        with model.head(range(start, stop)) as logits:
            for part, softmax in zip(parts, softmaxes, strict=True):
                softmax.add(start, logits(part).double())
    found = torch.zeros(model.n_vocabulary, dtype=torch.float64)
    for start, stop in model.head_blocks():
        with model.head(range(start, stop)) as logits:
            for part, softmax in zip(parts, softmaxes, strict=True):
                shares = (logits(part).double() - softmax.normalizer[:, None]).exp()
                found[start:stop] += shares.sum(dim=0).cpu()
    return found / len(states)


def nats_of(
    model: LayeredModel, states: Float32[Tensor, "places width"], said: Int64[Tensor, " places"]
) -> Float64[Tensor, " places"]:
    """`-log p(token)` of what is said after each place, of which some are in memory at a time.

    Args:
        model: The model.
        states: Behind its last layer.
        said: The tokens.
    """
    finished, tokens = torch.split(model.finish(states), PLACES), torch.split(said, PLACES)
    softmaxes = [Softmax(len(some), model.device) for some in finished]
    found = torch.zeros(len(said), dtype=torch.float64)
    of_said = torch.split(found, PLACES)
    for start, stop in model.head_blocks():
        with model.head(range(start, stop)) as logits:
            for some, softmax, of, them in zip(finished, softmaxes, of_said, tokens, strict=True):
                block = logits(some).double()
                softmax.add(start, block)
                inside = (them >= start) & (them < stop)
                of[inside] = block.cpu()[inside, them[inside] - start]
    return torch.cat([softmax.normalizer.cpu() for softmax in softmaxes]) - found
