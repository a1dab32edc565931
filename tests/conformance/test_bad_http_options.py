"""See `engine.testing.conformance.test_bad_http_options`."""

from engine.testing.conformance.test_bad_http_options import *
