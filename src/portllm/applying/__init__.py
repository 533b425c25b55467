"""Patches on a model in memory, and off again."""
