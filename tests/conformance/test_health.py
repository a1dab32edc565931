"""See `engine.testing.conformance.test_health`."""

from engine.testing.conformance.test_health import *
