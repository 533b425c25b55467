"""What tensors and modules are usually called: for a patch, which has no model, and for models of no known family."""

HEAD_MODULE = "lm_head"
HEAD = f"{HEAD_MODULE}.weight"
EMBEDDING_SUFFIX = "embed_tokens.weight"
EMBEDDING_NAMES = ("wte", "wpe")
"""Modules that are embeddings though their names do not say so."""


def is_embedding(module: str) -> bool:
    """Whether a module is an embedding, by its name.

    Example:
        >>> is_embedding("model.embed_tokens"), is_embedding("transformer.wte"), is_embedding("lm_head")
        (True, True, False)
    """
    kind = module.rsplit(".", 1)[-1]
    return "embed" in kind or kind in EMBEDDING_NAMES
