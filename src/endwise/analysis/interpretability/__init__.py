"""Explanations, and how well they predict where features fire."""
