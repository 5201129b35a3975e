"""sae-probes: probes of a few features on its 113 binary classification tasks, whose texts its package holds."""

from pathlib import Path
from typing import Literal

from endwise.config.base import Config, Positive
from endwise.suites.base import INSIDE, SUITES, Suite


class SaeProbesSettings(Config):
    datasets: tuple[str, ...] | None = None
    """Some of its tasks, e.g. `58_wikidatapolitical_party`; unset: all."""
    setting: Literal["normal", "scarcity", "imbalance"] = "normal"
    regularisation: Literal["l1", "l2"] = "l1"
    k: tuple[Positive, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    """Features of a probe."""
    binarize: bool = False
    """Probe if features fire, not how much."""
    seed: int = 42


@SUITES.add("sae-probes")
class SaeProbes(Suite[SaeProbesSettings]):
    name, package, module = "sae-probes", "sae-probes", "sae_probes"
    program = INSIDE / "on_sae_probes.py"
    Settings = SaeProbesSettings

    def __init__(self, settings: SaeProbesSettings, local: Path | None = None) -> None:
        super().__init__(settings, local)
        if local is not None:
            raise self.takes_no_data("Its texts come with its package; choose among them with datasets=[...].")

    def data_sets(self) -> list[str]:
        return []
