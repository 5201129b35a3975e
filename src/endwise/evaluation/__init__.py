"""Measuring an SAE on held-out text, and what a measured run stands on."""
