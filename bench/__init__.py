"""The benchmarks: `python -m bench.cost` and `python -m bench.speed`, from the root of the repository."""
