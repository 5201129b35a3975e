"""What a reader looks at: evaluated runs and comparisons as tables, a comparison as one self-contained HTML page.

Reads tables only; no model, no network.
"""

from endwise.report.page import write_report
from endwise.report.tables import print_evaluations, print_summary

__all__ = ["print_evaluations", "print_summary", "write_report"]
