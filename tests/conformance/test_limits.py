"""See `engine.testing.conformance.test_limits`."""

from engine.testing.conformance.test_limits import *
