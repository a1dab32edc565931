"""See `engine.testing.conformance.test_traffic`."""

from engine.testing.conformance.test_traffic import *
