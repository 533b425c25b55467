"""Commands that run a model: train, evaluate, demo."""
