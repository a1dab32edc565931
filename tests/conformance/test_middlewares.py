"""See `engine.testing.conformance.test_middlewares`."""

from engine.testing.conformance.test_middlewares import *
