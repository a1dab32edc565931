"""See `engine.testing.conformance.test_serving_forever`."""

from engine.testing.conformance.test_serving_forever import *
