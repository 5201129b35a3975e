"""Plans of what a run will cost, found before it is run."""
