"""See `engine.testing.conformance.test_replacing`."""

from engine.testing.conformance.test_replacing import *
