"""See `engine.testing.conformance.test_recycling`."""

from engine.testing.conformance.test_recycling import *
