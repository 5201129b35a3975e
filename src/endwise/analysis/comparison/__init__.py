"""Runs side by side: tables, figures and one page."""
