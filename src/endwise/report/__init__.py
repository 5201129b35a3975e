"""What a reader looks at: a comparison as one self-contained HTML page. Reads tables only; no model, no network."""

from endwise.report.page import write_report

__all__ = ["write_report"]
