"""What the patch does here: next-token log-probabilities of transformers and PEFT in float32."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from portllm.foreign import LoraLayer
from portllm.proving.faults import Change, Part
from portllm.running.encoding import Encoder, batches, pad_left
from portllm.running.model import Device, attach_adapter, choose_device, load_model

Ids: TypeAlias = tuple[int, ...]

NAME = "patch"
BATCH = 16


class Reference:
    """A base with a patch on it, and prompts.

    Args:
        folder: Checkpoint folder of the base.
        adapter: Adapter folder of the patch.
        rows: The ids of each prompt.
        device: Where to run.

    Raises:
        CheckpointError: The base cannot be loaded.
        AdapterFormatError: The patch does not fit it.
    """

    def __init__(self, folder: Path, adapter: Path, rows: Sequence[Ids], *, device: Device = "auto") -> None:
        self._device, self._rows = choose_device(device), rows
        model = load_model(folder, device=self._device, dtype=torch.float32, longest=max(map(len, rows)))
        self._model = attach_adapter(model, adapter, name=NAME).eval()
        self._layers = {
            name.removeprefix("base_model.model."): layer
            for name, layer in self._model.named_modules()
            if isinstance(layer, LoraLayer) and NAME in layer.scaling
        }
        config = model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None)
        self.head_rows: int | None = getattr(config, "head_dim", None) or (
            config.hidden_size // heads if heads else None
        )

    @property
    def parts(self) -> list[Part]:
        """The patch, module by module."""
        return [
            Part(name, layer.r[NAME], layer.lora_alpha[NAME], layer.scaling[NAME])
            for name, layer in self._layers.items()
        ]

    @property
    def rank_and_alpha(self) -> tuple[int, float]:
        """Those of the patch's configuration, for modules without others."""
        config = self._model.peft_config[NAME]
        return config.r, config.lora_alpha

    def base(self) -> NDArray[np.float32]:
        """Log-probabilities (prompts, vocabulary) of the bare base."""
        with self._model.disable_adapter():
            return self._log_probs(range(len(self._rows)))

    def patched(self, change: Change | None = None, *, first: int | None = None) -> NDArray[np.float32]:
        """Those with the patch, changed if need be, after the first few prompts or all."""
        with self._changed(change or Change()):
            return self._log_probs(range(len(self._rows))[:first])

    def null(self, seed: int) -> NDArray[np.float32]:
        """Those with a random patch of the same rank and the same norm in each module."""
        generator = torch.Generator().manual_seed(seed)
        with self._kept(), torch.no_grad():
            for layer in self._layers.values():
                a, b = _factors(layer)
                norm = _norm(a, b)
                for factor in (a, b):
                    factor.copy_(torch.randn(factor.shape, generator=generator))
                b.mul_(norm / _norm(a, b))
            return self._log_probs(range(len(self._rows)))

    @torch.inference_mode()
    def _log_probs(self, wanted: Sequence[int]) -> NDArray[np.float32]:
        found: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(wanted)
        rows = [self._rows[index] for index in wanted]
        for batch in batches(list(map(len, rows)), batch_size=BATCH):
            padded = pad_left([rows[index] for index in batch], device=self._device)
            logits = self._model(
                input_ids=padded.ids, attention_mask=padded.mask, position_ids=padded.positions, logits_to_keep=1
            ).logits[:, -1]
            values = logits.double().log_softmax(dim=-1).float().cpu().numpy()
            for index, value in zip(batch, values, strict=True):
                found[index] = value
        return np.stack(found)

    @contextlib.contextmanager
    def _changed(self, change: Change) -> Iterator[None]:
        with self._kept(), torch.no_grad():
            for name, factor in change.factors.items():
                _factors(self._layers[name])[1].mul_(factor)
            for name, order in change.reordered.items():
                b = _factors(self._layers[name])[1]
                heads = b.view(-1, len(order), b.shape[1])
                b.copy_(heads[:, list(order)].reshape(b.shape))
            yield

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """The factors are after the block what they were before it."""
        before = [[factor.clone() for factor in _factors(layer)] for layer in self._layers.values()]
        try:
            yield
        finally:
            for layer, kept in zip(self._layers.values(), before, strict=True):
                for factor, value in zip(_factors(layer), kept, strict=True):
                    factor.copy_(value)


def ids_by_text(encoder: Encoder) -> dict[str, int]:
    """The tokens by what they say, those that say the same left out."""
    ids: dict[str, int] = {}
    several: set[str] = set()
    for token in range(len(encoder.tokenizer)):
        text = encoder.tokenizer.decode([token])
        if text in ids:
            several.add(text)
        ids[text] = token
    return {text: token for text, token in ids.items() if text not in several}


def _factors(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank), as they are stored."""
    if NAME in layer.lora_A:
        return layer.lora_A[NAME].weight.data, layer.lora_B[NAME].weight.data
    return layer.lora_embedding_A[NAME].data, layer.lora_embedding_B[NAME].data


def _norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Frobenius norm of a product, without multiplying it out."""
    return float((b.double().T @ b.double() * (a.double() @ a.double().T)).sum().clamp(min=0).sqrt())
