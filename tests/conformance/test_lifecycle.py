"""See `engine.testing.conformance.test_lifecycle`."""

from engine.testing.conformance.test_lifecycle import *
