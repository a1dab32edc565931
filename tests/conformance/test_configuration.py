"""See `engine.testing.conformance.test_configuration`."""

from engine.testing.conformance.test_configuration import *
