"""Harvests: what each feature fires on, gathered in one pass over a corpus."""
