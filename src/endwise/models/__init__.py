"""A frozen language model with named sites, and what runs it with reconstructions in place."""
