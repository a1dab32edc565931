"""See `engine.testing.conformance.test_methods`."""

from engine.testing.conformance.test_methods import *
