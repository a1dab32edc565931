"""See `engine.testing.conformance.test_priorities`."""

from engine.testing.conformance.test_priorities import *
