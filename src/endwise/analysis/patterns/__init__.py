"""Scores of token patterns as predictors of where features fire, kind by kind."""
