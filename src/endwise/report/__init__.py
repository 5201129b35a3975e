"""What a reader looks at: plans, evaluated runs and comparisons as tables, a comparison as one HTML page.

Reads tables only; no model, no network.
"""

from endwise.report.directions import print_directions, write_directions
from endwise.report.geometry import print_geometry, write_geometry
from endwise.report.importance import print_importance, write_importance
from endwise.report.interpretability import print_interpretability, write_interpretability
from endwise.report.page import write_report
from endwise.report.pareto import print_pareto, write_pareto
from endwise.report.plans import print_plan
from endwise.report.tables import print_evaluations, print_summary

__all__ = [
    "print_directions",
    "print_evaluations",
    "print_geometry",
    "print_importance",
    "print_interpretability",
    "print_pareto",
    "print_plan",
    "print_summary",
    "write_directions",
    "write_geometry",
    "write_importance",
    "write_interpretability",
    "write_pareto",
    "write_report",
]
