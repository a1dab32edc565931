"""See `engine.testing.conformance.test_cancelling`."""

from engine.testing.conformance.test_cancelling import *
