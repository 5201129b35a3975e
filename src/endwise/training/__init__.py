"""Training: prepare, then run the loop."""
