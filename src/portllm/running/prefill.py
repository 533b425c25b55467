"""Prompts that a model has read once: any number of texts are scored or written from there on, by its cache."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from portllm.arrays import Float32
from portllm.running.encoding import PaddedBatch, pad_left, together
from portllm.running.model import PeftModel, PreTrainedModel

CONTINUATIONS = 64
"""Texts that go on from a cache together, at most."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """What a model has made of some prompts.

    Attributes:
        model: A causal language model.
        batch: The prompts.
        next_logits: Of the token after each prompt.
        cache: Keys and values of the prompts; None where nothing is to go on from there.
    """

    model: PreTrainedModel | PeftModel
    batch: PaddedBatch
    next_logits: Float32[torch.Tensor, "rows vocabulary"]
    cache: Any

    def go_on(self, rows: Sequence[int], texts: Sequence[tuple[int, ...]]) -> Float32[torch.Tensor, " texts"]:
        """`Σ log p(token | prompt, tokens before)` over all tokens of each text but the first, which are two or more.

        Args:
            rows: The prompt of each text; several may have the same one.
            texts: Their ids.
        """
        parts = together([len(text) - 1 for text in texts], self.next_logits.shape[1], most=CONTINUATIONS)
        sums = [self._go_on(rows[part], texts[part]) for part in parts]
        return torch.cat(sums) if sums else self.next_logits.new_zeros(0)

    def _go_on(self, rows: Sequence[int], texts: Sequence[tuple[int, ...]]) -> Float32[torch.Tensor, " texts"]:
        batch, device = self.batch, self.batch.ids.device
        places = torch.tensor(rows, device=device)
        cache = copy.deepcopy(self.cache)
        cache.reorder_cache(places)
        width = max(map(len, texts)) - 1
        # Texts are padded on the right: nothing that counts comes after the padding, and the causal mask hides it.
        inputs = torch.zeros(len(texts), width, dtype=torch.int64)
        targets = torch.zeros_like(inputs)
        counts = torch.zeros(len(texts), width)
        for index, text in enumerate(texts):
            inputs[index, : len(text) - 1] = torch.tensor(text[:-1])
            targets[index, : len(text) - 1] = torch.tensor(text[1:])
            counts[index, : len(text) - 1] = 1.0
        mask = torch.cat([batch.mask[places], torch.ones(len(texts), width, dtype=torch.int64, device=device)], dim=1)
        logits: torch.Tensor = self.model(
            input_ids=inputs.to(device),
            attention_mask=mask,
            position_ids=batch.positions[places, -1:] + 1 + torch.arange(width, device=device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        chosen = logits.float().log_softmax(dim=-1).gather(2, targets.to(device)[:, :, None])[:, :, 0]
        sums: torch.Tensor = (chosen * counts.to(device)).sum(dim=1)
        return sums


def prefill(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[tuple[int, ...]],
    *,
    device: torch.device,
    goes_on: bool = True,
) -> Prefill:
    """Has a model read prompts.

    Args:
        model: A causal language model in evaluation mode.
        prompts: Ids of each.
        device: Where the model is.
        goes_on: Whether more than the next token is asked for.
    """
    batch = pad_left(prompts, device=device)
    output = model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        logits_to_keep=1,
        use_cache=goes_on,
    )
    return Prefill(model, batch, output.logits[:, -1].float(), output.past_key_values if goes_on else None)


def completion_log_probs(read: Prefill, completions: Sequence[tuple[int, ...]]) -> Float32[torch.Tensor, " rows"]:
    """`Σ log p(token | prompt, tokens before)` of the completion of each prompt."""
    firsts = torch.tensor([[completion[0]] for completion in completions], device=read.next_logits.device)
    sums: torch.Tensor = read.next_logits.log_softmax(dim=-1).gather(1, firsts)[:, 0]
    longer = [row for row, completion in enumerate(completions) if len(completion) > 1]
    sums[longer] += read.go_on(longer, [completions[row] for row in longer])
    return sums
