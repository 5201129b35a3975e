"""What a run will cost, found before it is run."""
