"""See `engine.testing.conformance.test_routes`."""

from engine.testing.conformance.test_routes import *
