"""What takes minutes: twice the load that can be carried, and faults at random.

`make load` and `make soak` print a table of what was promised and what was seen, and end with 0
if every line says PASS. What starts the program is shared with the tests, in `tests/support`.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))
