"""The metrics of an SAE on held-out text, each a ratio of two sums over tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """`offset + sign · Σ numerator / Σ denominator` over tokens."""

    numerator: str
    denominator: str = "tokens"
    complement: bool = False
    """Report 1 − ratio (explained variances)."""


METRICS: dict[str, Metric] = {
    "l0": Metric("l0"),
    "kl": Metric("kl"),
    "ce_clean": Metric("ce_clean", "predictions"),
    "ce_spliced": Metric("ce_spliced", "predictions"),
    "ce_increase": Metric("ce_increase", "predictions"),
    "top1_agreement": Metric("top1_agreement"),
    "statistical_distance": Metric("statistical_distance"),
    "explained_variance.per_token": Metric("unexplained_share", complement=True),
    "explained_variance.pooled": Metric("error", "variance", complement=True),
    "explained_variance.per_token_layernorm": Metric("unexplained_share_layernorm", complement=True),
    "explained_variance.pooled_layernorm": Metric("error_layernorm", "variance_layernorm", complement=True),
}
OF_PREFIX: dict[str, Metric] = {
    "prefix_l0": METRICS["l0"],
    "prefix_ce_increase": METRICS["ce_increase"],
    "prefix_explained_variance": METRICS["explained_variance.per_token"],
}
"""Metrics that there is one of for each prefix of features, as in `prefix_l0.128`: of the first 128 alone."""
DOWNSTREAM = ("downstream_mse", "downstream_cosine")
"""Metrics that there is one of for each later residual site, as in `downstream_mse.blocks.5.hook_resid_pre`."""
