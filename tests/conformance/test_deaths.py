"""See `engine.testing.conformance.test_deaths`."""

from engine.testing.conformance.test_deaths import *
