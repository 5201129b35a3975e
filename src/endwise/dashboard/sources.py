"""The runs of a dashboard: what each is, its harvest, and what it is called."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endwise.common.errors import ConfigError, FormatError
from endwise.common.remarks import remarks_on
from endwise.common.text import model_title
from endwise.config.method import Knob, Method
from endwise.config.run import RunConfig
from endwise.dictionaries import SAE
from endwise.evaluation.finished import named
from endwise.features.harvest.results import Harvest, open_harvest
from endwise.runs.finding import harvested_runs
from endwise.runs.folder import RunFolder

LONG_NAME = 32
"""Characters from which on names crowd the bar: a sweep's folders are named after all that they vary."""


@dataclass(frozen=True)
class DashboardRun:
    """One run with its harvest."""

    path: Path
    name: str
    """Name of its folder, with as much of the path as tells it from the others; or, where such names are long and that
    is enough to tell the runs apart, method, knob and seed.
    """
    config: RunConfig
    harvest: Harvest

    def sae(self) -> SAE:
        """
        Raises:
            FormatError: it cannot be read, or has another number of features than the harvest.
        """
        sae = SAE.load(self.path)
        if sae.d_sae != self.harvest.d_sae:
            raise FormatError(
                f"{self.path} was harvested with {self.harvest.d_sae:,} features, but its SAE has {sae.d_sae:,}. "
                f"Harvest again: endwise harvest --again {shlex.quote(str(self.path))}"
            )
        return sae

    def facts(self) -> dict[str, Any]:
        """Facts for a reader about the run as a whole."""
        measured = RunFolder(self.path).measured() or {}
        firings = self.harvest.firings
        knob, tokens = Knob.of(self.config), int(self.harvest.about["tokens"])
        return {
            **named(self.config),
            "label": Method.of(self.config).label,
            "model": model_title(self.config.model.name),
            "knob": knob.label,
            "knob_value": knob.value,
            "d_sae": self.harvest.d_sae,
            "alive": int((firings > 0).sum()),
            "tokens": tokens,
            "l0": float(firings.sum()) / max(1, tokens),
            "ce_increase": measured.get("ce_increase"),
            "remarks": remarks_on(measured),
        }


def read_sources(runs: Sequence[str | Path]) -> list[DashboardRun]:
    """
    Raises:
        ConfigError: no run, or one twice.
        RunFolderError: a folder is no run, or was not harvested.
        FormatError: see `open_harvest`.
    """
    paths = harvested_runs(runs)
    if not paths:
        raise ConfigError("A dashboard takes one run or more; none was given.")
    resolved = [path.resolve() for path in paths]
    for place, path in enumerate(resolved):
        if path in resolved[:place]:
            raise ConfigError(f"A dashboard shows each run once; {paths[place]} was given twice. Leave one out.")
    configs = [RunFolder.open(path).config() for path in paths]
    seeds = [f" seed {config.seed}" if config.training.tokens else "" for config in configs]
    described = [f"{Method.of(of).label} {Knob.of(of)}{seed}" for of, seed in zip(configs, seeds, strict=True)]
    names = _names(resolved)
    if max(map(len, names)) > LONG_NAME and len(set(described)) == len(described):
        names = described
    return [
        DashboardRun(path, name, config, open_harvest(path))
        for path, name, config in zip(paths, names, configs, strict=True)
    ]


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell it from all others."""
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        depth = 1
        while depth < len(path.parts) and any(other.parts[-depth:] == path.parts[-depth:] for other in others):
            depth += 1
        names.append("/".join(path.parts[-depth:]))
    return names
