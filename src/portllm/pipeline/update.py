"""An update of a base model: what is read of it once, however many patches go through it."""

from dataclasses import dataclass
from functools import cached_property

from portllm.checkpoint.identity import fingerprint
from portllm.checkpoint.reader import Checkpoint
from portllm.patch.record import ModelIdentity
from portllm.pipeline.token_rows import TokenMap, match_tokens


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


def identify(checkpoint: Checkpoint) -> ModelIdentity:
    """A checkpoint's identity, from its fingerprint."""
    return ModelIdentity(
        checkpoint.name, fingerprint(checkpoint), revision=checkpoint.revision, quantization=checkpoint.quantization
    )
