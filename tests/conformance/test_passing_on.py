"""See `engine.testing.conformance.test_passing_on`."""

from engine.testing.conformance.test_passing_on import *
