"""Features that the model uses, and the number that carries most of the effect."""
