"""Directions of the activation: those that a dictionary keeps, and those that the model uses."""
