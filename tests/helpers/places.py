"""Paths of fixtures and tools that the tests use."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"
"""Programs that tests start stand here too."""
FIXTURES = ROOT / "tests" / "fixtures"
TOOLS = ROOT / "tools"
BENCHMARKS = ROOT / "benchmarks"
