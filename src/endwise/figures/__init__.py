"""Charts and pages, in one style. What they show is decided in `analysis`."""
