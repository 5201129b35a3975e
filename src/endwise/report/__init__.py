"""What a reader looks at: evaluated runs as a table, a comparison as one self-contained HTML page.

Reads tables only; no model, no network.
"""

from endwise.report.page import write_report
from endwise.report.tables import print_evaluations

__all__ = ["print_evaluations", "write_report"]
