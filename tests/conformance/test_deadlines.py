"""See `engine.testing.conformance.test_deadlines`."""

from engine.testing.conformance.test_deadlines import *
