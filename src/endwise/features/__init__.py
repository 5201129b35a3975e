"""Features of a finished SAE, and what they do: measurements that run the model."""
