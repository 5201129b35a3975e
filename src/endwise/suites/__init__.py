"""Benchmark suites of others, each run on a run of ours in an environment of its own: `endwise bench`.

A suite is two files: here what it needs and asks for (a `Suite`), and under `inside/` the program that its own
interpreter runs, which imports nothing of endwise.
"""

from endwise.suites import sae_probes, saebench_core, saebench_sparse_probing

__all__ = ["sae_probes", "saebench_core", "saebench_sparse_probing"]
