"""Explanations of features by a language model behind an HTTP endpoint, and how well they predict the features.

Every part that needs no network is apart from the part that does: which texts are shown and which are asked about
(`samples`), how they are written (`rendering`, `prompts`), how answers are read (`answers`), how they are scored
(`scorers`). Calls go through `client`, which never makes one whose answer is kept (`cache`).
"""
