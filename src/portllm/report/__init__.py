"""Results in words: `numbers` says numbers, the `_tables` modules make rows of what a command found. Pure."""
