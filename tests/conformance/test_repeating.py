"""See `engine.testing.conformance.test_repeating`."""

from engine.testing.conformance.test_repeating import *
