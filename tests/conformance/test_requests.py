"""See `engine.testing.conformance.test_requests`."""

from engine.testing.conformance.test_requests import *
