"""See `engine.testing.conformance.test_status`."""

from engine.testing.conformance.test_status import *
