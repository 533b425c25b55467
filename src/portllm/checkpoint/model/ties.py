"""Tied heads: one matrix that serves as input embedding and as output head.

A file may hold a tied head once (no `lm_head.weight`) or twice (the same numbers under that name, in the same or in
another floating-point dtype); both mean the same model, so both have the same identity, and a patch sees the same
modules.
"""

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import same_values
from portllm.checkpoint.model.families import family_of, resolve
from portllm.checkpoint.tensor.info import TensorInfo

HEAD_MODULE = "lm_head"
HEAD = f"{HEAD_MODULE}.weight"
EMBEDDING_SUFFIX = "embed_tokens.weight"


def embedding(checkpoint: Checkpoint) -> TensorInfo | None:
    """The input embedding: where the model's family has it, or where the checkpoint names it in the usual way."""
    family = family_of(checkpoint.config)
    found = None if family is None else resolve(family.embedding, checkpoint)
    if found is not None:
        return found
    return next((info for name, info in checkpoint.infos.items() if name.endswith(EMBEDDING_SUFFIX)), None)


def stored_head(checkpoint: Checkpoint) -> TensorInfo | None:
    """The output head, where the checkpoint stores one, in whatever spelling."""
    family = family_of(checkpoint.config)
    return resolve(HEAD if family is None else family.head, checkpoint)


def tied_embedding(checkpoint: Checkpoint) -> TensorInfo | None:
    """The embedding that the head shares its values with, or None for a model with a head of its own.

    A head that is not in the file is tied. One that is in the file is tied when the configuration says so and it holds
    the embedding's numbers: a tied model that was trained on with a head of its own is not tied. Files on disk are
    compared whole; files on a server by samples, so that what fetches them may find that a head differs after all.
    """
    shared, head = embedding(checkpoint), stored_head(checkpoint)
    if shared is None or head is None:
        return shared
    return shared if _says_tied(checkpoint) and same_values(head, shared) else None


def _says_tied(checkpoint: Checkpoint) -> bool:
    """What the configuration says; models of vision and text may say it in the part about text."""
    config = checkpoint.config
    if "tie_word_embeddings" not in config and isinstance(inner := config.get("text_config"), dict):
        config = inner
    return config.get("tie_word_embeddings") is True
