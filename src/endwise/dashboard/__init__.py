"""Dashboards for a reader to explore: every feature of one or several runs, as static files that open from a disk
(`site`), or served with the model behind them (`serving`).
"""

from endwise.dashboard.site import write_dashboard

__all__ = ["write_dashboard"]
