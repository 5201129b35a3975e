"""Measures the importance of the features of finished runs; those of one model share every clean pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from endwise.analysis.importance.ablation import AblationSums, choose
from endwise.analysis.importance.faithfulness import FaithfulnessSums
from endwise.common.counting import counting
from endwise.common.errors import ConfigError, DataError
from endwise.common.files import expanded
from endwise.config.run import RunConfig
from endwise.dictionaries import SAE
from endwise.evaluation.counting import Counting, Spot
from endwise.evaluation.finished import load_sae, sharing_groups
from endwise.evaluation.provenance import corpora_of_runs, heldout_fingerprint, model_of
from endwise.features.attribution import Attribution
from endwise.features.importance_table import MeasuredImportance, read_measured, write_measured
from endwise.features.spliced import SplicedBatch, spliced_ce
from endwise.models.language_model import LanguageModel
from endwise.models.sites import Place, Site
from endwise.runs.folder import RunFolder
from endwise.tokens import Corpora, Corpus, TokenBatch

BLOCKS = 20
"""Runs of neighbouring sequences whose sums are kept apart, for intervals of what is not a sum over tokens."""
ABLATED = 100
"""Features that are ablated one by one, unless asked otherwise."""


def measure_importance(
    runs: Sequence[str | Path],
    *,
    tokens: int | None = None,
    ablate: int = ABLATED,
    kl: bool = False,
    again: bool = False,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    display: bool = False,
) -> dict[Path, MeasuredImportance]:
    """Measure run folders, or read what was measured before; arguments and errors as for `importance`."""
    if ablate < 0:
        raise ConfigError(f"The number of features to ablate (ablate) must be 0 or more; given {ablate}.")
    configs = {path: RunFolder.config_of_trained(path) for path in map(expanded, runs)}
    settings = {path: _settings(path, config, tokens, ablate, kl) for path, config in configs.items()}
    text = {path: heldout_fingerprint(path, corpora) for path in configs}
    for path, fingerprint in text.items():
        settings[path] |= {} if fingerprint is None else {"heldout": fingerprint}
    found = {} if again else {path: read_measured(path) for path in configs}
    results = {path: old for path, old in found.items() if old is not None and _serves(old, settings[path], text[path])}
    missing = {path: config for path, config in configs.items() if path not in results}
    for paths in sharing_groups(missing, tokens):
        group = _group({path: missing[path] for path in paths}, settings, model, corpora)
        measured = group.measure(display)
        for path in paths:
            results[path] = measured[path]
            write_measured(path, measured[path])
    return {path: results[path] for path in configs}


def _settings(path: Path, config: RunConfig, tokens: int | None, ablate: int, kl: bool) -> dict[str, Any]:
    return {
        "tokens": tokens or config.evaluation.tokens,
        "ablate": ablate,
        "kl": kl,
        "blocks": BLOCKS,
        "seed": config.evaluation.seed,
        "weights": RunFolder(path).weights_digest(),
    }


def _serves(old: MeasuredImportance, settings: Mapping[str, Any], heldout: str | None) -> bool:
    """True if a measurement is what the settings ask for, of the text that is meant; one that has the KL besides will
    do.
    """
    if old.settings.get("heldout") != heldout:
        return False
    return {**old.settings, "kl": settings["kl"] and old.settings.get("kl")} == {**old.settings, **settings}


def _group(
    configs: Mapping[Path, RunConfig],
    settings: Mapping[Path, Mapping[str, Any]],
    model: LanguageModel | None,
    corpora: Corpora | None,
) -> "_Group":
    first = next(iter(configs.values()))
    wanted = settings[next(iter(configs))]
    model = model_of(configs, model)
    corpora = corpora_of_runs(configs, model, corpora, evaluation_tokens=wanted["tokens"])
    corpus, sequences = corpora.heldout, wanted["tokens"] // corpora.heldout.context
    if sequences < 2:
        raise ConfigError(
            f"Importance is measured on two halves of the held-out sequences, so it takes at least two of "
            f"{corpus.context} tokens: raise tokens from {wanted['tokens']} to {2 * corpus.context} or more."
        )
    if len(corpus) < sequences:
        raise DataError(
            f"{corpus.name} has {len(corpus)} sequences of {corpus.context} held-out tokens, fewer than the "
            f"{sequences} asked for. Lower tokens to {corpus.tokens}."
        )
    saes = {path: (model.place(config.place), load_sae(path, config, model)) for path, config in configs.items()}
    return _Group(model, saes, corpus, sequences, first.evaluation.batch, settings)


@dataclass(frozen=True)
class _Group:
    """Runs of one model and one corpus."""

    model: LanguageModel
    saes: Mapping[Path, tuple[Place, SAE]]
    corpus: Corpus
    sequences: int
    batch: int
    settings: Mapping[Path, Mapping[str, Any]]

    @property
    def sites(self) -> list[Site]:
        """All that are read or written."""
        return sorted({site for place, _ in self.saes.values() for site in place.sites})

    def spot(self, path: Path) -> Spot:
        """Return where a run's SAE writes, and the tokens that count for it."""
        return self.saes[path][0].writes, Counting.of([self.saes[path]])

    @property
    def spots(self) -> list[Spot]:
        return sorted({self.spot(path) for path in self.saes})

    @property
    def half(self) -> int:
        """The first sequence of the second half, where the second half of the blocks begins."""
        return (self.sequences + 1) // 2

    def measure(self, display: bool) -> dict[Path, MeasuredImportance]:
        with counting("importance", 2 * self.sequences - self.half, display) as advance:
            attributions, means = self._attribute(advance)
            importance = {path: each.result() for path, each in attributions.items()}
            for path, each in importance.items():
                if not torch.from_numpy(each.ce_blocks).isfinite().all():
                    raise DataError(
                        f"{path}: the CE or its gradient is NaN or infinite on some held-out sequence. Look for a "
                        "diverged SAE or model."
                    )
            seeds = {path: settings["seed"] for path, settings in self.settings.items()}
            samples = {p: choose(each, self.settings[p]["ablate"], seeds[p]) for p, each in importance.items()}
            ablations = {path: AblationSums(sae, samples[path]) for path, (_, sae) in self.saes.items()}
            curves = {p: FaithfulnessSums(sae, importance[p], seeds[p]) for p, (_, sae) in self.saes.items()}
            bounds = self._second_half(ablations, curves, means, advance)
        self._in_between(curves, bounds, display)
        heldout = {"heldout": self.corpus.fingerprint()}
        return {
            path: MeasuredImportance(
                importance[path],
                ablations[path].result(importance[path]),
                curves[path].result(*torch.cat(bounds[self.spot(path)], dim=1).numpy()),
                {**heldout, **self.settings[path]},
            )
            for path in self.saes
        }

    def _attribute(self, advance: Callable[[int], None]) -> tuple[dict[Path, Attribution], dict[Spot, Tensor]]:
        """The pass over all sequences; with it the mean activation of each site over the tokens that count there."""
        kl = any(self.settings[path]["kl"] for path in self.saes)
        blocks = min(BLOCKS, self.sequences) // 2 * 2
        attributions = {p: Attribution(sae, self.sequences, blocks, kl=kl) for p, (_, sae) in self.saes.items()}
        sums = {spot: torch.zeros(self.model.width(spot[0]), dtype=torch.float64) for spot in self.spots}
        tokens = dict.fromkeys(sums, 0)
        for batch in self._batches(range(self.sequences)):
            clean = self.model.clean(batch.tokens, record=self.sites, final=kl)
            for spot, total in sums.items():
                mask = spot[1].of_these(clean, batch.mask)
                tokens[spot] += int(mask.sum())
                total += clean.activations[spot[0]][mask].double().sum(0).cpu()
            for path, (place, _) in self.saes.items():
                attributions[path].add(self.model, clean, place, batch.mask)
            advance(len(batch.tokens))
        means = {spot: (total / max(1, tokens[spot])).float().to(self.model.device) for spot, total in sums.items()}
        return attributions, means

    def _second_half(
        self,
        ablations: Mapping[Path, AblationSums],
        curves: Mapping[Path, FaithfulnessSums],
        means: Mapping[Spot, Tensor],
        advance: Callable[[int], None],
    ) -> dict[Spot, list[Tensor]]:
        """The pass over the second half; per spot and batch `[3 batch]`: CE clean and mean-ablated, predictions."""
        bounds: dict[Spot, list[Tensor]] = {spot: [] for spot in self.spots}
        for batch in self._batches(range(self.half, self.sequences)):
            clean = self.model.clean(batch.tokens, record=self.sites, final=True)
            whole = {}
            for path, (place, sae) in self.saes.items():
                spliced = SplicedBatch.of(self.model, sae, clean, place, batch.mask)
                ablations[path].add(self.model, spliced)
                curves[path].add(self.model, spliced)
                whole[self.spot(path)] = spliced
            for spot, spliced in whole.items():
                constant, compared = means[spot].expand_as(clean.activations[spot[0]]), spliced.whole
                ablated = spliced_ce(self.model, clean, spot[0], spliced.mask, constant)
                of_clean = compared.ce_clean.sum(1, dtype=torch.float64)
                bounds[spot].append(torch.stack([of_clean, ablated, compared.predicts.sum(1).double()]).cpu())
            advance(len(batch.tokens))
        return bounds

    def _in_between(
        self, curves: Mapping[Path, FaithfulnessSums], bounds: Mapping[Spot, list[Tensor]], display: bool
    ) -> None:
        """Further passes over the second half, for as long as a curve asks for more counts."""
        bases = {spot: float(torch.cat(each, dim=1)[1].sum()) for spot, each in bounds.items()}
        while wanted := {p: each for p, each in curves.items() if each.narrow(bases[self.spot(p)])}:
            sites = sorted({site for path in wanted for site in self.saes[path][0].sites})
            with counting("features that carry most", self.sequences - self.half, display) as advance:
                for batch in self._batches(range(self.half, self.sequences)):
                    clean = self.model.clean(batch.tokens, record=sites)
                    for path, each in wanted.items():
                        each.add_between(self.model, clean, self.saes[path][0], batch.mask)
                    advance(len(batch.tokens))

    def _batches(self, sequences: range) -> Iterator[TokenBatch]:
        self.model.attend_within(self.corpus.layout.ends)
        for start in range(sequences.start, sequences.stop, self.batch):
            yield self.corpus.batch(range(start, min(start + self.batch, sequences.stop))).to(self.model.device)
