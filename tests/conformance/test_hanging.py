"""See `engine.testing.conformance.test_hanging`."""

from engine.testing.conformance.test_hanging import *
