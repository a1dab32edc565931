"""Runs the suite from the command line: ``python -m engine.testing.conformance --adapter package:factory``."""

from __future__ import annotations

import sys

try:
    import pytest
except ImportError:
    sys.exit('the suite runs on pytest, which is not installed: pip install "engineroom[conformance]"')

OWN_NAMES = ["-o", "python_files=test_*.py", "-o", "python_functions=test_*"]
"""Those of the suite's files and tests, whatever the project calls its own that it is run from."""

if __name__ == "__main__":
    sys.exit(
        pytest.main(
            ["-p", f"{__package__}.plugin", *OWN_NAMES, "--pyargs", __package__, *sys.argv[1:]],
        )
    )
