"""Stored tensors: what each is (dtype, shape, encoding, place), and its values by range, by row or whole."""
