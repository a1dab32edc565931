"""See `engine.testing.conformance.test_failing`."""

from engine.testing.conformance.test_failing import *
