"""Measures, pure: how far an evolved model moved from its base."""
