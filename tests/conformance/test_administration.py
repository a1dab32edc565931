"""See `engine.testing.conformance.test_administration`."""

from engine.testing.conformance.test_administration import *
