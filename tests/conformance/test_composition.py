"""See `engine.testing.conformance.test_composition`."""

from engine.testing.conformance.test_composition import *
