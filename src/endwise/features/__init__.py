"""What single features of a finished SAE do: measurements that run the model."""
