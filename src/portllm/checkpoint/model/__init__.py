"""A checkpoint as one model: its names, families, ties, identity, and the files beside its weights."""
