"""See `engine.testing.conformance.test_results`."""

from engine.testing.conformance.test_results import *
