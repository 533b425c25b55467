"""A patch from an adapter and its base, or from two checkpoints."""
