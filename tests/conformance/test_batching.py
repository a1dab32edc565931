"""See `engine.testing.conformance.test_batching`."""

from engine.testing.conformance.test_batching import *
