"""See `engine.testing.conformance.test_bad_input`."""

from engine.testing.conformance.test_bad_input import *
