"""What a token of training costs each kind, measured on runs that train alone, one after another."""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from endwise.errors import ConfigError, FormatError
from endwise.files import write_json
from endwise.reading import read_json
from endwise.reproduction.experiments import Experiments
from endwise.run_config import Kind, RunConfig
from endwise.run_folder import RunFolder
from endwise.sweeps.tasks import Loaded
from endwise.training import train

SETTLED = 0.5
"""Share of a run after which its speed is taken: at first many features are active, which no long run stays at."""
LEAST_STEPS = 3


@dataclass(frozen=True)
class Cost:
    """Seconds per training token of a run that trains alone."""

    kind: Kind
    site: str
    ratio: float | None
    """None: the study's own dictionary."""
    seconds_per_token: float
    tokens: int
    """Over how many it was measured."""


def costs(experiments: Experiments, file: Path) -> list[Cost]:
    """The costs of every kind at every site, and at the first site with every size; measured once, and then read."""
    if file.exists():
        return _read(file)
    study = experiments.study
    settings = [(site, None) for site in study.sites] + [(study.site, ratio) for ratio in study.ratios]
    loaded, measured = Loaded(), []
    with tempfile.TemporaryDirectory() as scratch:
        timed = replace(experiments, folder=Path(scratch))
        for site, ratio in settings:
            for kind in study.kinds:
                config = timed.single(kind, site, ratio, study.cost_tokens)
                measured.append(Cost(kind, site, ratio, _seconds_per_token(config, loaded), study.cost_tokens))
    write_json(file, {"costs": [vars(cost) for cost in measured]})
    return measured


def _seconds_per_token(config: RunConfig, loaded: Loaded) -> float:
    """Over the latter part of a run."""
    training = config.training.model_copy(update={"log_every": 1, "checkpoint_every": None})
    config = config.model_copy(update={"training": training})
    run = train(config, model=loaded.model(config), corpora=loaded.corpora(config), display=False)
    folder = RunFolder(run.folder)
    tokens = [line["tokens"] for line in folder.metrics()]
    seconds = [json.loads(line)["seconds"] for line in folder.timings_file.read_text().splitlines()]
    if len(tokens) < LEAST_STEPS:
        raise ConfigError(
            f"cost_tokens is {training.tokens:,}, which are {len(tokens)} training steps; a speed takes at least "
            f"{LEAST_STEPS}. Raise it."
        )
    start = int(len(tokens) * SETTLED)
    return (seconds[-1] - seconds[start]) / (tokens[-1] - tokens[start])


def _read(file: Path) -> list[Cost]:
    try:
        return [Cost(**cost) for cost in read_json(file)["costs"]]
    except (KeyError, TypeError) as error:
        raise FormatError(f"{file} holds no costs as they are written ({error}). Remove it to measure anew.") from None


def seconds_per_token(costs: list[Cost], config: RunConfig) -> float:
    """Of a recipe; of a site or size that was not measured, what the kind costs at the first."""
    of_kind = [cost for cost in costs if cost.kind == config.objective.kind]
    for cost in of_kind:
        if cost.site == config.site and cost.ratio == config.dictionary.ratio:
            return cost.seconds_per_token
    at_site = [cost for cost in of_kind if cost.site == config.site] or of_kind
    return at_site[0].seconds_per_token


def as_rows(costs: list[Cost]) -> list[dict[str, Any]]:
    """With each kind's cost relative to local's at the same site and size."""
    local = {(cost.site, cost.ratio): cost.seconds_per_token for cost in costs if cost.kind == "local"}
    return [
        {**vars(cost), "relative_to_local": cost.seconds_per_token / local[cost.site, cost.ratio]} for cost in costs
    ]
