"""Costs of a token of training, kind by kind, measured on runs that train alone, one after another."""

import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from endwise.common.errors import ConfigError, FormatError
from endwise.common.files import read_json, write_json
from endwise.common.statistics import Interval, bootstrap_ratio
from endwise.config.objective import Kind
from endwise.config.run import RunConfig
from endwise.paper.experiments import Experiments
from endwise.runs.folder import RunFolder
from endwise.sweeps.tasks import ModelCache
from endwise.training.train import train

SETTLED = 0.5
"""Share of a run after which its speed is taken: at first many features are active, which no long run stays at."""
LEAST_STEPS = 3
RESAMPLES = 1000


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
    low: float | None = None
    high: float | None = None
    """95 % bootstrap interval over training steps; None: it was timed without."""


def costs(experiments: Experiments, file: Path) -> list[Cost]:
    """The costs of every kind at every site, and at the first site with every size; measured once, and then read."""
    if file.exists():
        return _read(file)
    study = experiments.study
    settings = [(site, None) for site in study.sites] + [(study.site, ratio) for ratio in study.ratios]
    loaded, measured = ModelCache(), []
    with tempfile.TemporaryDirectory() as scratch:
        timed = replace(experiments, folder=Path(scratch))
        for site, ratio in settings:
            for kind in study.kinds:
                config = timed.single(kind, site, ratio, study.cost_tokens)
                speed = _seconds_per_token(config, loaded)
                measured.append(
                    Cost(kind, site, ratio, speed.estimate, study.cost_tokens, low=speed.low, high=speed.high)
                )
    write_json(file, {"costs": [vars(cost) for cost in measured]})
    return measured


def _seconds_per_token(config: RunConfig, loaded: ModelCache) -> Interval:
    """Over the latter part of a run, with its interval over steps."""
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
    return bootstrap_ratio(np.diff(seconds[start:]), np.diff(tokens[start:]), RESAMPLES, config.seed)


def _read(file: Path) -> list[Cost]:
    try:
        return [Cost(**cost) for cost in read_json(file)["costs"]]
    except (KeyError, TypeError) as error:
        raise FormatError(f"{file} is not a valid file of costs ({error}). Remove it to measure again.") from None


def seconds_per_token(costs: list[Cost], config: RunConfig) -> float:
    """Return a recipe's cost; of a site or size that was not measured, what the kind costs at the first."""
    of_kind = [cost for cost in costs if cost.kind == config.objective_name]
    for cost in of_kind:
        if cost.site == config.site and cost.ratio == config.dictionary.ratio:
            return cost.seconds_per_token
    at_site = [cost for cost in of_kind if cost.site == config.site] or of_kind
    return at_site[0].seconds_per_token


def relative_to_local(costs: list[Cost], kind: Kind, site: str) -> Interval | None:
    """Return what the kind costs as a multiple of local at a site, with the study's dictionary. The interval spans all
    that is within both kinds' own; without one, its ends are NaN. None: they were not both timed there.
    """
    own = {cost.kind: cost for cost in costs if (cost.site, cost.ratio) == (site, None)}
    if kind not in own or "local" not in own:
        return None
    cost, local = own[kind], own["local"]
    low, high = math.nan, math.nan
    if cost.low and cost.high and local.low and local.high:
        low, high = cost.low / local.high, cost.high / local.low
    return Interval(low=low, high=high, estimate=cost.seconds_per_token / local.seconds_per_token)


def as_rows(costs: list[Cost]) -> list[dict[str, Any]]:
    """Make rows with each kind's cost relative to local's at the same site and size."""
    local = {(cost.site, cost.ratio): cost.seconds_per_token for cost in costs if cost.kind == "local"}
    return [
        {**vars(cost), "relative_to_local": cost.seconds_per_token / local[cost.site, cost.ratio]} for cost in costs
    ]
