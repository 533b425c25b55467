"""How well a model answers, and what an update of its base took from it.

`metrics` is arithmetic on rows, `scoring` runs a model over rows, `compare` sets base, patched base, evolved, ported
and retrained side by side.
"""
