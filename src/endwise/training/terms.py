"""The terms that endwise brings: whoever imports this module has them registered."""

from endwise.training.kl_subset import KLSubset
from endwise.training.objectives import KL, DownstreamMSE, FeatureMSE, LocalMSE, Sparsity

__all__ = ["KL", "DownstreamMSE", "FeatureMSE", "KLSubset", "LocalMSE", "Sparsity"]
