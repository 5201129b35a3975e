"""SAEBench's core evaluation: cross-entropy and KL with the SAE in place, sparsity, reconstruction, densities."""

from collections.abc import Mapping
from typing import Any

from endwise.config.base import Config, Positive
from endwise.suites.base import INSIDE, SUITES, Suite


class CoreSettings(Config):
    """Settings whose numbers of batches are those of the published results."""

    dataset: str = "Skylion007/openwebtext"
    """Text on the hub, with a column `text`, or `tokens` of one length."""
    context: Positive = 128
    batch: Positive = 16
    """Sequences."""
    reconstruction_batches: Positive = 200
    variance_batches: Positive = 2000
    spare_special_tokens: bool = True
    """Leave BOS, EOS and padding as they are where the reconstruction is spliced in."""


@SUITES.add("saebench-core")
class SaebenchCore(Suite[CoreSettings]):
    name, package, module = "saebench-core", "sae-bench", "sae_bench"
    program = INSIDE / "on_saebench_core.py"
    Settings = CoreSettings
    takes_heldout = True

    def data_sets(self) -> list[str]:
        return [] if self.local else [self.settings.dataset]

    def ours(self, evaluation: Mapping[str, Any]) -> dict[str, float]:
        bounds = evaluation["baselines"]
        gap = bounds["zero_ablated"] - bounds["clean"]
        return {
            "ce_loss_score": (bounds["zero_ablated"] - evaluation["ce_spliced"]) / gap,
            "ce_loss_without_sae": bounds["clean"],
            "ce_loss_with_sae": evaluation["ce_spliced"],
            "ce_loss_with_ablation": bounds["zero_ablated"],
            "kl_div_with_sae": evaluation["kl"],
            "l0": evaluation["l0"],
            "explained_variance": evaluation["explained_variance"]["pooled"],
            "explained_variance_legacy": evaluation["explained_variance"]["per_token"],
            "frac_alive": evaluation["alive"] / evaluation["d_sae"],
        }
