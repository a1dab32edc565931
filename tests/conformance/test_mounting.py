"""See `engine.testing.conformance.test_mounting`."""

from engine.testing.conformance.test_mounting import *
