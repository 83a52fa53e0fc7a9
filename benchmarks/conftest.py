"""`pytest benchmarks` finds this package from the root of a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
