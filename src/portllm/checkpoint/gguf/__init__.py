"""GGUF files, read as named tensors."""
