"""Where things lie that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS, DOCS = ROOT / "configs", ROOT / "docs"
DATA = ROOT.parent / "shared" / "data"
"""Benchmark files beside the repository, where there are any."""
RIVALS = ROOT / "tests" / "rivals.py"
