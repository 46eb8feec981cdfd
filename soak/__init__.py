"""Tests that take minutes: `make load` (overload) and `make soak` (random faults).

Both print a table of promises and results, and exit with 0 if every line says PASS. They share the
code that starts the program with the tests (`tests/support`).
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))
