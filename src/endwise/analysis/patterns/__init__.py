"""How well patterns of tokens predict where features fire, kind by kind."""
