"""Carry a patch from its base to an evolved base."""
