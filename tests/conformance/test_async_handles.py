"""See `engine.testing.conformance.test_async_handles`."""

from engine.testing.conformance.test_async_handles import *
