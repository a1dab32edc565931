"""See `engine.testing.conformance.test_statistics`."""

from engine.testing.conformance.test_statistics import *
