"""What a model writes after a prompt, always taking the likeliest token."""

from collections.abc import Sequence

import torch

from portllm.running.encoding import Encoder
from portllm.running.model import PeftModel, PreTrainedModel
from portllm.running.prefill import Prefill, prefill


def write(
    model: PreTrainedModel | PeftModel,
    encoder: Encoder,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
    one_line: bool,
    device: torch.device,
) -> list[tuple[int, ...]]:
    """The tokens that a model writes after each prompt, with the end mark where it comes to one.

    Args:
        model: In evaluation mode.
        encoder: Of the model.
        prompts: Ids of each.
        max_new_tokens: Most tokens written.
        one_line: Stop behind the first line that is not blank.
        device: Where the model is.
    """
    return write_on(prefill(model, prompts, device=device), encoder, max_new_tokens=max_new_tokens, one_line=one_line)


def write_on(read: Prefill, encoder: Encoder, *, max_new_tokens: int, one_line: bool) -> list[tuple[int, ...]]:
    """The same after prompts that were read; their cache is used up. Rows that have ended are not run on for long."""
    mask, positions, cache, logits = read.batch.mask, read.batch.positions, read.cache, read.next_logits
    written: list[list[int]] = [[] for _ in mask]
    here = list(range(len(mask)))  # the rows that are run
    ended: set[int] = set()
    for step in range(max_new_tokens):
        ids = logits.argmax(dim=-1, keepdim=True)
        for row, token in zip(here, ids[:, 0].tolist(), strict=True):
            if row not in ended:
                written[row].append(token)
                if token in encoder.stops or (one_line and "\n" in encoder.decode(written[row]).lstrip()):
                    ended.add(row)
        open_places = [place for place, row in enumerate(here) if row not in ended]
        if not open_places or step + 1 == max_new_tokens:
            break
        if 2 * len(open_places) <= len(here):
            kept = torch.tensor(open_places, device=ids.device)
            cache.reorder_cache(kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
            here = [here[place] for place in open_places]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
        output = read.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
            use_cache=True,
        )
        cache, logits = output.past_key_values, output.logits[:, -1]
    return [tuple(tokens) for tokens in written]
