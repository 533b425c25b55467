"""Bytes of tensors, by range, by row or whole, from files here or at a hub."""
