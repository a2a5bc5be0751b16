"""Fixtures of the tests of recordings."""

from tests.unit.recording.fake_server import fake

__all__ = ["fake"]
