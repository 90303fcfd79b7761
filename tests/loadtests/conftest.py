"""The load tests are scripts and not a package: they import each other by their folder, as when they are run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "loadtests"))
