"""See `engine.testing.conformance.test_silence`."""

from engine.testing.conformance.test_silence import *
