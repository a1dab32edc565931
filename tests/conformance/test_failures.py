"""See `engine.testing.conformance.test_failures`."""

from engine.testing.conformance.test_failures import *
