"""Pattern explanations after Neuron to Graph (Foote et al. 2023, arXiv:2305.19911), without a language model to ask.

On one half of a text: contexts in which a feature fires (`sampling`), the shortest suffix of each that keeps its
activation (`suffixes`), tokens of it that may be any, or some others (`substitution`), all of a feature's as a trie
(`trie`). On the other half the tries say where features fire and how strongly, and are scored (`scores`).
"""
