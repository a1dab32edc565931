"""See `engine.testing.conformance.test_closing`."""

from engine.testing.conformance.test_closing import *
