"""How well patterns of tokens foretell where features fire, kind by kind."""
