"""See `engine.testing.conformance.test_streams`."""

from engine.testing.conformance.test_streams import *
