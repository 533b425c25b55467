"""The hub that remote ranges are read from."""

from tests.checkpoint.conftest import hub, waits

__all__ = ["hub", "waits"]
