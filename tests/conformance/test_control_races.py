"""See `engine.testing.conformance.test_control_races`."""

from engine.testing.conformance.test_control_races import *
