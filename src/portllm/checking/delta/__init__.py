"""What a patch is beside the update of its base: its size, its place, its rounding."""
