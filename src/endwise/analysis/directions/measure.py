"""Norms and principal directions of finished runs: measured once, kept in each run's folder.

Runs of one model, site and held-out text share every clean pass, the directions and the resample ablation, which is a
property of the model and not of any SAE.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from endwise.analysis.directions.norms import NormCollector, Norms
from endwise.analysis.directions.principal import AlongDirections, Estimates, Floats, Principal, principal
from endwise.analysis.directions.resample_ablation import resample_ablation
from endwise.analysis.directions.text_at_site import TextAtSite
from endwise.common.errors import FormatError, RunFolderError
from endwise.common.files import expanded, read_json
from endwise.common.remedies import unreadable
from endwise.common.showing import Shown
from endwise.common.statistics import resampling_weights
from endwise.common.tensor_files import write_tensors
from endwise.config.run import RunConfig
from endwise.dictionaries import SAE
from endwise.evaluation.counting import Counting
from endwise.evaluation.finished import load_sae, sharing_groups
from endwise.evaluation.provenance import corpora_of_runs, model_of
from endwise.formats import weights_file
from endwise.models.language_model import LanguageModel
from endwise.runs.folder import RunFolder
from endwise.tokens import Corpora

FILE = "directions.safetensors"
VERSION = 1
"""Raised when the same settings would be measured otherwise than before."""
ABLATED_TOKENS = 8192
"""Held-out tokens on which directions are ablated, one tail pass a direction."""
SMALL = 256
"""Up to this width all directions are ablated unless asked otherwise."""
TOP = 64
"""Directions ablated above it: this many of the first directions, and as many of the others."""
SAME_VARIANCE = 1e-6
"""Relative difference up to which two measurements of the variances are of the same directions."""


@dataclass(frozen=True, repr=False)
class RunDirections(Shown):
    """Effect of one run's SAE on lengths and with the principal directions of the activations at its site; directions
    in the order of their variance, `[d_model]` each.
    """

    settings: Mapping[str, Any]
    """Settings of the measurement: text, site, seeds, and which SAE."""
    norms: Norms
    variance: Floats
    """Variance of the activations along each direction."""
    kl: Estimates
    """KL of the resample ablation, nats per token; the same for all runs of one model, site and text. NaN where a
    direction was not ablated."""
    correlation: Estimates
    explained_variance: Estimates
    tokens: int
    """Over which the directions and their reconstruction were measured; position 0 and document starts left out."""

    @property
    def text(self) -> str:
        """Equal for runs whose directions are the same: model, site, held-out text, and how it was read."""
        return _text_of(self.settings)

    @property
    def variance_share(self) -> Floats:
        """Share of the activations' variance, by direction."""
        return self.variance / max(float(self.variance.sum()), np.finfo(float).tiny)

    def write(self, file: Path) -> None:
        tensors = {"variance": torch.from_numpy(self.variance)}
        for name in _ESTIMATED:
            each: Estimates = getattr(self, name)
            tensors[name] = torch.from_numpy(np.stack([each.estimate, each.low, each.high]))
        head = {"settings": dict(self.settings), "norms": self.norms.to_json(), "tokens": self.tokens}
        write_tensors(file, tensors, {"endwise": json.dumps(head)})

    @classmethod
    def read(cls, file: Path) -> "RunDirections":
        """
        Raises:
            FormatError: the file does not hold what `write` writes.
        """
        try:
            with safe_open(file, "numpy") as opened:
                head = json.loads(opened.metadata()["endwise"])
                estimated = {name: Estimates(*opened.get_tensor(name)) for name in _ESTIMATED}
                variance = opened.get_tensor("variance")
            return cls(head["settings"], Norms.of_json(head["norms"]), variance, tokens=head["tokens"], **estimated)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            damaged = FormatError(f"{file} is not a valid file of directions ({error}). Remove it.")
            raise unreadable(file, error) or damaged from None


_ESTIMATED = ("kl", "correlation", "explained_variance")


def measure_directions(
    runs: Iterable[Path],
    *,
    tokens: int | None = None,
    directions: int | None = None,
    with_starts: bool = False,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
) -> dict[Path, RunDirections]:
    """Measure run folders, or read what was measured before; arguments and errors as for `directions`."""
    configs = {path: RunFolder.open(path).config() for path in map(expanded, runs)}
    heldout = None if corpora is None else corpora.heldout.describe()
    settings = {
        path: _settings(path, config, tokens, directions, with_starts, heldout) for path, config in configs.items()
    }
    found = {path: kept for path in configs if (kept := _kept(path, settings[path])) is not None}
    missing = {path: config for path, config in configs.items() if path not in found}
    for group in sharing_groups(missing, tokens):
        first = missing[group[0]]
        own = {path: missing[path] for path in group}
        loaded, wanted = model_of(own, model), settings[group[0]]["tokens"]
        texts = corpora_of_runs(own, loaded, corpora, evaluation_tokens=wanted)
        placed = {path: (loaded.place(own[path].place), load_sae(path, own[path], loaded)) for path in group}
        spots = {path: (place, Counting.of([(place, sae)])) for path, (place, sae) in placed.items()}
        for place, counting in dict.fromkeys(spots.values()):
            here = {path: settings[path] for path in group if spots[path] == (place, counting)}
            text = TextAtSite.first(loaded, place, texts.heldout, wanted, first.evaluation.batch, counting)
            measured = _measure(text, {path: placed[path][1] for path in here}, here, list(found.values()))
            for path, each in measured.items():
                each.write(path / FILE)
            found |= measured
    return {path: found[path] for path in configs}


def _settings(
    path: Path,
    config: RunConfig,
    tokens: int | None,
    directions: int | None,
    with_starts: bool,
    heldout: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All that a run's numbers follow from, as far as its folder has it."""
    if not weights_file(path / "sae").exists():
        raise RunFolderError(f"{path} holds no trained SAE yet; train it first: endwise train --resume {path}")
    data_file = RunFolder(path).data_file
    if heldout is None and data_file.exists():
        heldout = read_json(data_file).get("heldout")
    return {
        "version": VERSION,
        "model": config.model.model_dump(mode="json", include={"name", "gguf_file", "revision", "dtype"}),
        "site": config.place,
        "data": config.data.model_dump(mode="json", exclude={"cache", "epochs", "seed"}),
        "heldout": heldout,
        "tokens": config.evaluation.tokens if tokens is None else tokens,
        "ablated_tokens": ABLATED_TOKENS,
        "directions": directions,
        "with_starts": with_starts,
        "resamples": config.evaluation.bootstrap,
        "seed": config.evaluation.seed,
        "sae": RunFolder(path).weights_digest(),
    }


def _text_of(settings: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in settings.items() if name != "sae"}, sort_keys=True)


def _kept(path: Path, settings: Mapping[str, Any]) -> RunDirections | None:
    """Read what was measured before with the same settings; what cannot be read is measured again."""
    try:
        kept = RunDirections.read(path / FILE)
    except FormatError:
        return None
    return kept if kept.settings == settings else None


def _measure(
    text: TextAtSite, saes: Mapping[Path, SAE], settings: Mapping[Path, dict[str, Any]], known: Sequence[RunDirections]
) -> dict[Path, RunDirections]:
    """Runs of one site and text, in one pass for their directions, one for their SAEs, and the ablation."""
    shared = next(iter(settings.values()))
    with_starts, resamples, seed = (shared[name] for name in ("with_starts", "resamples", "seed"))
    found = principal(text, with_starts=with_starts)
    variance = found.variance.cpu().numpy()
    kl = _known_kl(known, _text_of(shared), variance)
    if kl is None:
        kl = _kl(text, found, chosen(len(variance), shared["directions"]), with_starts, resamples, seed)
    lengths = {path: NormCollector() for path in saes}
    along = {path: AlongDirections(found, with_starts=with_starts) for path in saes}
    with torch.no_grad():
        for batch in text.batches():
            x = found.along(batch.activation)
            for path, sae in saes.items():
                reconstruction = sae(batch.read.float())
                lengths[path].add(batch, reconstruction)
                along[path].add(batch, x, reconstruction)
    result = {}
    for path in saes:
        fit = along[path].reconstructed(resamples, seed)
        norms = lengths[path].norms(resamples, seed)
        result[path] = RunDirections(
            settings[path], norms, variance, kl, fit.correlation, fit.explained_variance, found.tokens
        )
    return result


def _known_kl(known: Iterable[RunDirections], text: str, variance: Floats) -> Estimates | None:
    """Find the KL in another run with the same directions."""
    for each in known:
        if each.text == text and np.allclose(each.variance, variance, rtol=SAME_VARIANCE, atol=1e-9 * variance.sum()):
            return each.kl
    return None


def chosen(width: int, directions: int | None) -> list[int]:
    """Choose the directions to ablate: all of few, or the first and as many of the others, spread evenly."""
    top = (width if width <= SMALL else TOP) if directions is None else directions
    if 2 * top >= width:
        return list(range(width))
    others = np.linspace(top, width - 1, top).round().astype(int)
    return [*range(top), *dict.fromkeys(int(each) for each in others)]


def _kl(
    text: TextAtSite, found: Principal, directions: Sequence[int], with_starts: bool, resamples: int, seed: int
) -> Estimates:
    part = text.of_at_most(ABLATED_TOKENS)
    sums, tokens = resample_ablation(part, found, directions, seed=seed, with_starts=with_starts)
    weights = resampling_weights(len(tokens), resamples, seed)
    counts = (weights @ tokens)[:, None]
    draws = np.where(counts > 0, weights @ sums / np.maximum(counts, 1.0), np.nan)
    measured = Estimates.of_draws(draws, sums.sum(0) / tokens.sum())
    whole = {name: np.full(len(found.variance), math.nan) for name in ("estimate", "low", "high")}
    for name, values in whole.items():
        values[list(directions)] = getattr(measured, name)
    return Estimates(**whole)
