"""See `engine.testing.conformance.test_sync_handles`."""

from engine.testing.conformance.test_sync_handles import *
