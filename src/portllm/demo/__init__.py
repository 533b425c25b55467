"""The whole story on a real small model, offline, on a CPU: train, evolve, port, merge, compare."""
