"""An update of a base model: what is read of it once, however many patches go through it."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.errors import Refusal
from portllm.matching.changes import outline
from portllm.matching.compatibility import mismatches
from portllm.matching.token_rows import TokenMap, match_tokens
from portllm.measures.drift import DriftSums, measure_drift
from portllm.patch.identify import identify
from portllm.patch.patch import Patch
from portllm.patch.record import ModelIdentity
from portllm.tensors.info import FLOAT_DTYPES, TensorInfo
from portllm.tensors.windows import load_spans, sample_span


@dataclass(frozen=True)
class Update:
    """Two versions of a model. Identities and token rows are read when they are first asked for, and kept.

    Attributes:
        base: The earlier version, where it is known.
        evolved: The later one.
    """

    base: Checkpoint | None
    evolved: Checkpoint

    @cached_property
    def source(self) -> ModelIdentity | None:
        """The identity of the base, where it is known."""
        return None if self.base is None else identify(self.base)

    @cached_property
    def target(self) -> ModelIdentity:
        """The identity of the evolved model."""
        return identify(self.evolved)

    @cached_property
    def tokens(self) -> TokenMap | None:
        """Which rows follow which tokens; None where they are the same in both, or a model does not say."""
        return None if self.base is None else match_tokens(self.base, self.evolved)

    def mismatches(self, patch: Patch[TensorInfo], *, n_rows: int | None = None) -> tuple[Refusal, ...]:
        """Why a patch cannot be put on the evolved model; found once for all patches of the same outline.

        Args:
            patch: What is put on it.
            n_rows: How many rows its embedding and its head get for it; None for as many as they have.
        """
        asked = outline(patch), n_rows
        if asked not in self._mismatches:
            self._mismatches[asked] = tuple(mismatches(patch, self.evolved, n_rows=n_rows))
        return self._mismatches[asked]

    def window_sums(self, names: Iterable[str]) -> DriftSums:
        """The drift of some tensors that both models have, in the windows that the fingerprints read."""
        names = tuple(names)
        if names not in self._sums:
            self._sums[names] = self._sum_windows(names)
        return self._sums[names]

    def _sum_windows(self, names: Sequence[str]) -> DriftSums:
        known, spans, missing = self._windows, [], []
        for name in [name for name in names if name not in known]:
            weight = None if self.base is None else self.base.tensor(name)
            moved = self.evolved.tensor(name)
            known[name] = DriftSums()
            if (
                weight is not None
                and moved is not None
                and weight.shape == moved.shape
                and weight.dtype in FLOAT_DTYPES
            ):
                # The same elements of both: where the dtypes differ, so do the windows of the fingerprints.
                spans += [(info, *sample_span(weight)) for info in (weight, moved)]
                missing.append(name)
        values = load_spans(spans)
        for name, old, new in zip(missing, values, values, strict=True):
            known[name] = measure_drift(old, new)
        return sum((known[name] for name in names), DriftSums())

    @cached_property
    def _mismatches(self) -> dict[Hashable, tuple[Refusal, ...]]:
        """What has been found so far."""
        return {}

    @cached_property
    def _sums(self) -> dict[tuple[str, ...], DriftSums]:
        """Those that were asked for: most patches of a base change the same modules."""
        return {}

    @cached_property
    def _windows(self) -> dict[str, DriftSums]:
        """What has been read so far."""
        return {}
