"""Proposal of a first recipe for a model: what fits it, the text and this machine, with a reason for each choice."""

import json
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from endwise.common.errors import ConfigError, DataError, ModelError
from endwise.common.files import expanded, there_is
from endwise.common.text import model_title
from endwise.config.base import Config, Positive
from endwise.config.places import build_recipe
from endwise.config.run import DataConfig, EvaluationConfig, RunConfig
from endwise.evaluation.text_check import bos_left_out, own_bos
from endwise.models.loading import TokenizerAlone, find_device, load_model, read_tokenizer
from endwise.tokens import check_readable, corpora_for
from endwise.tokens.loading import EMBEDDED
from endwise.tokens.sources import commit_on_hub
from endwise.training.planning.outline import sites_of
from endwise.training.planning.plan import TrainingPlan, plan

HUB_TEXT, HUB_CONFIG = "HuggingFaceFW/fineweb", "sample-10BT"
"""Text of the hub that a first recipe names where the hub answers."""
BOS = "prepend_bos"
CONTEXT = {"cpu": 256, "cuda": 1024}
"""Tokens per sequence at most."""
PER_STEP = {"cpu": 2048, "cuda": 16_384}
"""Tokens per optimiser step, about."""
LEAST_STEPS = 1000
"""Tokens of a training; with little text batches are smaller."""
RATIO, LEAST_RATIO = 16, 2
FEATURES_PER_L0, LEAST_L0, MOST_L0 = 16, 16, 64
"""Active features per token: width of the site over the first, within the others (what the field trains there)."""
TUNED_WIDTH, TUNED_RATE, LEAST_RATE = 128, 4e-3, 2e-4
"""The learning rate falls as the square of the width, from the one that was tuned on the embedded model to about the
least, a little under the paper's on GPT2-small (5e-4 at a width of 768)."""
PHASES = {
    "staged": "on the activation, then the next block's input, then predictions and all later activations",
    "finetune": "on the activation, then on predictions too",
}
SECONDS = 3600.0
"""Length of training that is aimed at."""
EFFICIENCY = 0.3
"""Share of the speed of a large product that training reaches, about."""
LEAST_TOKENS, MOST_TOKENS = 100_000, 500_000_000


class ProposalSettings(Config):
    """Choices of a caller; what is unset is chosen."""

    model: str = EMBEDDED
    data: str | None = None
    column: str | None = None
    tokens: Positive | None = None
    l0: Positive | None = None
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Proposal:
    """A recipe, with what it needs here."""

    text: str
    """The recipe as YAML, with comments."""
    config: RunConfig
    plan: TrainingPlan
    minutes: float
    """Rough length of training, from the speed of a matrix product here and now."""
    remarks: tuple[str, ...]


def propose(settings: ProposalSettings) -> Proposal:
    """Choose a recipe for a model, and plan it.

    Raises:
        ModelError: the model cannot be loaded.
        DataError: its text cannot be read, or is too short for a single step.
        ConfigError: no recipe fits the memory that is free.
    """
    if settings.column is not None and settings.data is None:
        raise ConfigError(f"--column {settings.column} is a column of --data, which is not given. Give both.")
    device = find_device(settings.device).type
    reader = read_tokenizer(settings.model) or load_model(settings.model)
    context = min(reader.context or CONTEXT[_kind(device)], CONTEXT[_kind(device)])
    data, held_out, there, remarks = _text(settings.data, settings.column, reader, context)
    site, width, phases = _middle(settings.model)
    batch = max(1, PER_STEP[_kind(device)] // context)
    values: dict[str, Any] = {
        "model": {"name": settings.model, "device": settings.device},
        "site": site,
        "dictionary": {
            "architecture": "batchtopk",
            "ratio": RATIO,
            "k": settings.l0 or min(MOST_L0, max(LEAST_L0, round(width / FEATURES_PER_L0))),
            "aux": 0.03125,
            "aux_target": "residual",
            "revive": 3e-3,
        },
        "phases": phases,
        "data": data | {"context": context},
        "training": {
            "tokens": batch * context,
            "batch": batch,
            "learning_rate": float(f"{max(LEAST_RATE, min(1.0, (TUNED_WIDTH / width) ** 2) * TUNED_RATE):.1g}"),
            "precision": "mixed" if device == "cuda" else "exact",
        },
        "evaluation": {"tokens": max(context, min(held_out, EvaluationConfig().tokens))},
        "seed": settings.seed,
    }
    values["evaluation"]["during_training_tokens"] = min(20_000, values["evaluation"]["tokens"])
    if settings.tokens:
        values["training"] |= _steps(settings.tokens, batch, context)
    made = _fitting(values)
    rate = _speed(device) * EFFICIENCY
    needed = made.sparse_flops or made.flops.per_token
    if not settings.tokens:
        values["training"] |= _steps(_tokens(rate * SECONDS / needed, there, batch * context), batch, context)
        made = plan(build_recipe(values))
    config = build_recipe(values)
    assert isinstance(config, RunConfig)
    minutes = needed * config.training.tokens / rate / 60
    return Proposal(_written(values, width, there), config, made, minutes, tuple(remarks))


def _steps(tokens: int, batch: int, context: int) -> dict[str, int]:
    """Keys of `training`: batches no larger than asked, and small enough for the least number of steps."""
    batch = max(1, min(batch, tokens // (LEAST_STEPS * context)))
    steps = tokens // (batch * context)
    every = {"evaluate_every": max(1, steps // 20), "checkpoint_every": max(1, steps // 10)}
    return {"tokens": tokens, "batch": batch, **every}


def _kind(device: str) -> str:
    return device if device in CONTEXT else "cpu"


def _middle(model: str) -> tuple[str, int, str]:
    """The stream into the block in the middle, or the nearest that takes an SAE and has a block after its own; its
    width; and the phases of training, which before the last block have no later activations to keep.
    """
    found = sites_of(model).widths
    layers = {int(re.findall(r"\d+", name)[0]): name for name in found if name.endswith("hook_resid_pre")}
    if not layers:
        raise ModelError(f"{model} has no residual stream that takes an SAE. Choose a site by hand: endwise sites.")
    count = 1 + max(int(re.findall(r"\d+", name)[0]) for name in found)
    layer = min(layers, key=lambda layer: (layer == count - 1, abs(layer - count // 2), layer))
    return layers[layer], found[layers[layer]], "finetune" if layer == count - 1 else "staged"


def _text(
    given: str | None, column: str | None, reader: TokenizerAlone | Any, context: int
) -> tuple[dict[str, Any], int, int | None, list[str]]:
    """The section `data`; the tokens that are held out, and to train on (None: as many as one likes); what to say."""
    data: dict[str, Any] = {"source": given or EMBEDDED} | ({} if column is None else {"column": column})
    remarks: list[str] = []
    on_hub = given is not None and given != EMBEDDED and not there_is(expanded(given))
    if given is None and reader.vocab_size and (commit := commit_on_hub(HUB_TEXT, None)) is not None:
        data = {"source": HUB_TEXT, "dataset_config": HUB_CONFIG, "revision": commit}
        data |= {} if own_bos(reader.tokenizer) is None else {BOS: True}
        on_hub = True
    elif given is None:
        remarks.append(
            "The text is the embedded corpus, how-to articles and captions of videos: enough to try everything. For "
            "features of what your model usually reads, name other text: --data FILE, FOLDER or DATASET."
        )
    if on_hub:
        if given is not None:
            check_readable(DataConfig(**data, streaming=True))
        return data | {"streaming": True}, EvaluationConfig().tokens, None, remarks
    corpora = corpora_for(reader, DataConfig(**data, context=context), training_tokens=1, evaluation_tokens=1)
    data |= {BOS: True} if bos_left_out(reader.tokenizer, corpora.train) else {}
    return data, corpora.heldout.tokens, corpora.train.tokens, remarks


def _fitting(values: dict[str, Any]) -> TrainingPlan:
    """Lower the dictionary's size until the recipe fits; return the plan.

    Raises:
        ConfigError: it does not fit at the least size either.
    """
    while True:
        config = build_recipe(values)
        made = plan(config)
        lacking = [need for need in made.needs if not need.fits]
        if not lacking:
            return made
        if values["dictionary"]["ratio"] <= LEAST_RATIO:
            raise ConfigError(
                f"No recipe for this model fits here: {'; '.join(f'{n.what}: {n.advice}' for n in lacking)} Take a "
                "smaller model, or a machine with more memory."
            )
        values["dictionary"]["ratio"] //= 2


def _speed(device: str) -> float:
    """Floating-point operations a second of a product that is large for the device, now."""
    size = 4096 if device == "cuda" else 1024
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a = torch.ones(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        float((a @ a)[0, 0])
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times[1:])


def _tokens(affordable: float, there: int | None, per_step: int) -> int:
    """Round down to two digits, and to whole steps of the text that is there.

    Raises:
        DataError: that is less than one step.
    """
    wanted = min(max(affordable, LEAST_TOKENS), MOST_TOKENS)
    digits = 10 ** (math.floor(math.log10(wanted)) - 1)
    found = int(wanted // digits * digits)
    found = (found if there is None else min(found, there)) // per_step * per_step
    if not found:
        raise DataError(f"The text has {there:,} tokens to train on, and a step takes {per_step:,}. Give more text.")
    return found


def _written(values: dict[str, Any], width: int, there: int | None) -> str:
    """The recipe as YAML, with the reasons as comments."""
    model, data, training = values["model"], values["data"], values["training"]
    dictionary, ratio = values["dictionary"], values["dictionary"]["ratio"]
    sources = "\n".join(f"  {key}: {_scalar(value)}" for key, value in data.items() if key not in ("context", BOS))
    bos = f"\n  {BOS}: true  # as the model's tokenizer begins every text" if BOS in data else ""
    room = "streamed: as long as training lasts" if there is None else f"{there:,} tokens to train on"
    return f"""\
# A first recipe for {" ".join(model_title(model["name"]).split())}, by endwise init. Every key: docs/configuration.md.
model:
  name: {_scalar(model["name"])}
  device: {_scalar(model["device"])}  # auto: CUDA if there is one
site: {values["site"]}  # the residual stream into the block in the middle, {width} wide; all sites: endwise sites
dictionary:
  architecture: {dictionary["architecture"]}  # why: docs/choosing.md
  ratio: {ratio}  # features per dimension of the site: {ratio * width:,} in all
  k: {dictionary["k"]:g}  # active features per token, on average
  aux: {dictionary["aux"]}  # dead features learn what the others leave out,
  aux_target: {dictionary["aux_target"]}  # all of it, also where predictions are the objective
  revive: {dictionary["revive"]}  # pulls features that do not fire back
phases: {values["phases"]}  # {PHASES[values["phases"]]}
data:
{sources}  # {room}
  context: {data["context"]}  # tokens per sequence{bos}
training:
  tokens: {training["tokens"]}
  batch: {training["batch"]}  # sequences per step
  learning_rate: {training["learning_rate"]}  # a guess from the width; endwise tune finds a better one
  precision: {training["precision"]}
  evaluate_every: {training["evaluate_every"]}
  checkpoint_every: {training["checkpoint_every"]}  # endwise train --resume RUN continues from the last
evaluation:
  tokens: {values["evaluation"]["tokens"]}  # held-out tokens that it is measured on
  during_training_tokens: {values["evaluation"]["during_training_tokens"]}
seed: {values["seed"]}
"""


def _scalar(value: Any) -> str:
    """A value as YAML on one line."""
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z/][\w./-]*", value)
    return value if plain and yaml.safe_load(value) == value else json.dumps(value)
