"""See `engine.testing.conformance.test_calls_not_begun`."""

from engine.testing.conformance.test_calls_not_begun import *
