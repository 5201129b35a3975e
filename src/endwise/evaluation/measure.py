"""Measures finished SAEs on held-out text; several SAEs of one model share every clean pass.

Every metric is a ratio of two sums over tokens. The sums are kept per sequence, which is what the bootstrap resamples
and what paired comparisons between runs are made of.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm

from endwise.common.axes import Activation, TokenMask
from endwise.common.counting import counting
from endwise.common.errors import ConfigError
from endwise.common.html import table
from endwise.common.processes import ALONE, World
from endwise.common.remarks import remarks_on
from endwise.common.showing import Shown, notes
from endwise.common.statistics import Interval, bootstrap_ratio
from endwise.common.text import minus
from endwise.config.run import EvaluationConfig
from endwise.dictionaries import SAE, Latents, at_inference
from endwise.evaluation.counting import Counting, Spot
from endwise.evaluation.metrics import DOWNSTREAM, METRICS, OF_PREFIX, Metric
from endwise.evaluation.text_check import facts_of_text
from endwise.models.language_model import Clean, LanguageModel, Spliced
from endwise.models.readout import Comparison
from endwise.models.sites import Part, Place, Site
from endwise.models.splicing import SplicedPass, later_residuals, squared_error
from endwise.tokens import Corpus, TokenBatch

Sums = dict[str, NDArray[np.float64]]
"""Per-sequence sums by name, each `[sequences]`."""


@dataclass(frozen=True)
class Baselines:
    """Cross-entropies that bound the scale, nats per token: the site untouched, at its mean, at zero."""

    clean: float
    mean_ablated: float
    zero_ablated: float


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """One SAE's metrics with 95 % bootstrap intervals over sequences."""

    site: Site
    d_sae: int
    firings: NDArray[np.int64] = field(repr=False)
    """Number of the `tokens` tokens at which each feature is non-zero, `[d_sae]`."""
    tokens: int
    metrics: dict[str, Interval]
    """Intervals by the names of `METRICS`, and `<metric>.<site>` for the `DOWNSTREAM` ones."""
    baselines: Baselines
    sums: Sums = field(repr=False)
    text: str | None = None
    """Digest of the sequences that it was measured on (`Corpus.text_digest`)."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further facts about the measurement: `asked_tokens`, those of `facts_of_text`, how training went (`loss`)."""
    reads: Site | None = None
    """The site that the SAE reads, where it is another than `site`, which it writes."""

    @property
    def place(self) -> Place:
        return Place(self.site if self.reads is None else self.reads, self.site)

    @property
    def remarks(self) -> list[str]:
        """Remarks that a reader of these numbers needs."""
        return remarks_on(self._record())

    @property
    def alive(self) -> int:
        """Features that fired at least once in `tokens` tokens; compare only equal numbers of tokens."""
        return int((self.firings > 0).sum())

    def shown_facts(self) -> Mapping[str, object]:
        numbers = {
            "L0": f"{self['l0']:.1f}",
            "CE increase": minus(f"{self['ce_increase']:+.4f} nats"),
            "KL": f"{self['kl']:.4f}",
        }
        alive = f"{self.alive:,} of {self.d_sae:,}"
        return {"at": self._record()["site"], **numbers, "alive": alive, "tokens": f"{self.tokens:,}"}

    def shown_parts(self) -> Iterable[str]:
        rows = [(name, *(f"{each:.4g}" for each in (i.estimate, i.low, i.high))) for name, i in self.metrics.items()]
        bounds = [(f"CE, {name.replace('_', ' ')}", f"{ce:.4g}") for name, ce in vars(self.baselines).items()]
        yield from notes(self.remarks)
        yield table(("metric", "estimate", "95 % from", "to"), [*rows, *((*each, "", "") for each in bounds)])

    def __getitem__(self, metric: str) -> float:
        return self.metrics[metric].estimate

    def to_json(self) -> dict[str, Any]:
        """Nested as in `explained_variance: {per_token: ...}`, with intervals and remarks under keys of their own."""
        intervals = {name: [interval.low, interval.high] for name, interval in self.metrics.items()}
        return {**self._record(), "intervals": intervals, "remarks": self.remarks}

    def _record(self) -> dict[str, Any]:
        nested: dict[str, Any] = {"site": self.place.name, "d_sae": self.d_sae, "alive": self.alive}
        nested |= {"alive_tokens": self.tokens, "tokens": self.tokens, "sequences": len(self.sums["tokens"])}
        nested["text"] = self.text
        for name, interval in self.metrics.items():
            group, _, key = name.partition(".")
            if key:
                nested.setdefault(group, {})[key] = interval.estimate
            else:
                nested[name] = interval.estimate
        for name in DOWNSTREAM:
            nested.setdefault(name, {})
        return {**nested, "baselines": vars(self.baselines), **self.facts}


_Key = tuple[str, int | None] | tuple[Spot, str]
"""Subject of a measurement: an SAE, whole or its first features alone; or a site at its mean or at zero."""


def measure(
    model: LanguageModel,
    saes: Mapping[str, tuple[Place | Site | str, SAE]],
    corpus: Corpus,
    config: EvaluationConfig | Mapping[str, Any],
    *,
    baselines: bool = True,
    prefixes: Mapping[str, Sequence[int]] | None = None,
    world: World = ALONE,
) -> dict[str, Evaluation]:
    """Evaluate every SAE on `config.tokens` tokens of the held-out corpus, after its first `config.skip`.

    Args:
        saes: each with its place, or the place's name. Of a transcoder, what is compared is what it writes.
        baselines: also measure the site at its mean and at zero; without, those two are NaN.
        prefixes: of an SAE, numbers of first features that are measured alone besides.
        world: the processes that share the work; each of them gets the whole result.

    Raises:
        ConfigError: fewer tokens are asked for than one sequence has.
    """
    sequences = sequences_of(corpus, config := EvaluationConfig.of(config))
    places = {name: model.place(place) for name, (place, _) in saes.items()}
    spots = {name: (places[name].writes, Counting.of([(places[name], sae)])) for name, (_, sae) in saes.items()}
    means = site_means(model, sorted(set(spots.values())), corpus, config, sequences, world)
    shares: dict[str, tuple[int | None, ...]] = {name: (None, *(prefixes or {}).get(name, ())) for name in saes}
    collected = {(name, length): Collector() for name in saes for length in shares[name]}
    ablations = {(spot, kind): Collector() for spot in means for kind in ("mean", "zero") if baselines}
    collectors: dict[_Key, Collector] = {**collected, **ablations}
    later = {site: residuals_after(model, site) for site, _ in means}
    recorded = {site for place in places.values() for site in place.sites}.union(*later.values())
    with world.together("evaluating"), torch.no_grad(), at_inference(sae for _, sae in saes.values()):
        for batch in batches_of(corpus, config.batch, sequences, model.device, world):
            clean = model.clean(batch.tokens, record=recorded, final=True)
            passes: dict[Counting, dict[_Key, Effect]] = {counting: {} for _, counting in means}
            masks = {counting: counting.of_these(clean, batch.mask) for counting in passes}
            for name, (_, sae) in saes.items():
                (site, counting), read = spots[name], clean.activations[places[name].reads]
                whole, mask = sae.encode(read), masks[counting]
                for key in ((name, length) for length in shares[name]):
                    latents = _first(whole, key[1], sae.d_sae)
                    estimate = sae.reconstruct(latents, read)
                    left_out = {"left_out": (batch.mask & ~mask).sum(-1)} if counting.limits else {}
                    collected[key].add_latents(latents, mask)
                    collected[key].add(fit_sums(clean.activations[site], estimate, means[spots[name]], mask) | left_out)
                    passes[counting][key] = _splice(model, clean, site, estimate, later[site], mask)
            for spot, kind in ablations:
                estimate = means[spot].instead_of(clean.activations[spot[0]], kind)
                passes[spot[1]][spot, kind] = _splice(model, clean, spot[0], estimate, (), masks[spot[1]])
            for counting, effects in passes.items():
                for key, sums in _compared(model, clean, effects, masks[counting]).items():
                    collectors[key].add(sums)
    for collector in collectors.values():
        collector.merge(world)
    text, facts = corpus.text_digest(sequences), {"asked_tokens": config.tokens, **facts_of_text(model, corpus)}
    found: dict[str, Evaluation] = {}
    for name, (_, sae) in saes.items():
        own, bounds = {n: collected[name, n] for n in shares[name]}, _bounds(ablations, spots[name])
        found[name] = replace(_summarise(places[name], sae, own, bounds, config, facts), text=text)
    return found


def _bounds(ablations: "Mapping[tuple[Spot, str], Collector]", spot: Spot) -> "dict[str, Collector]":
    return {kind: each for (where, kind), each in ablations.items() if where == spot}


def _compared(
    model: LanguageModel, clean: Clean, effects: "Mapping[_Key, Effect]", mask: TokenMask
) -> "dict[_Key, dict[str, Tensor]]":
    """The sums of passes that count the same tokens."""
    finals = [effect.final for effect in effects.values()]
    compared = model.readout.compare(final_of(clean), finals, clean.tokens, mask)
    return {
        key: prediction_sums(comparison, mask) | effect.downstream
        for (key, effect), comparison in zip(effects.items(), compared, strict=True)
    }


def _first(latents: Latents, length: int | None, d_sae: int) -> Latents:
    """The latents with all features but the first at 0; None: as they are."""
    return latents if length is None else latents.only(torch.arange(d_sae, device=latents.l0().device) < length)


def residuals_after(model: LanguageModel, site: Site) -> tuple[Site, ...]:
    """Every residual site after `site`: each later block's input, and the last block's output."""
    last = model.readable(Site(model.n_layers - 1, Part.RESID_POST))
    return later_residuals(model, site) + ((last,) if last != site else ())


@dataclass(frozen=True)
class Means:
    """Mean activation over the corpus, before and after LayerNorm without affine, `[d_model]` each."""

    raw: Tensor
    layernorm: Tensor

    def instead_of(self, activation: Activation, kind: str) -> Activation:
        """Return what is the same for every token: the mean, or zero."""
        constant = self.raw if kind == "mean" else torch.zeros_like(self.raw)
        return constant.to(activation.dtype).expand_as(activation)


class Collector:
    """Gathers per-sequence sums batch by batch."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}
        self._firings: Tensor | None = None

    def add(self, sums: Mapping[str, Tensor]) -> None:
        for name, values in sums.items():
            self._parts.setdefault(name, []).append(values.double().cpu())

    def add_latents(self, latents: Latents, mask: TokenMask) -> None:
        firings = latents.firings(mask).cpu()
        self._firings = firings if self._firings is None else self._firings + firings
        self.add({"l0": latents.l0().where(mask, 0.0).sum(-1)})

    def merge(self, world: World) -> None:
        """Bring together what the processes collected, in the order of the batches, which they took in turns."""
        if world.size == 1:
            return
        gathered = world.gather((self._parts, self._firings))
        for name in gathered[0][0]:
            turns = zip_longest(*(parts.get(name, []) for parts, _ in gathered))
            self._parts[name] = [part for turn in turns for part in turn if part is not None]
        everywhere = [each for _, each in gathered if each is not None]
        self._firings = torch.stack(everywhere).sum(0) if everywhere else None

    def firings(self) -> NDArray[np.int64]:
        return np.zeros(0, np.int64) if self._firings is None else self._firings.numpy()

    def sums(self) -> Sums:
        return {name: torch.cat(parts).numpy() for name, parts in self._parts.items()}


def sequences_of(corpus: Corpus, config: EvaluationConfig) -> range:
    """The sequences that are measured."""
    first, count = config.skip // corpus.context, config.tokens // corpus.context
    if not count:
        raise ConfigError(f"evaluation.tokens is {config.tokens}; one sequence alone has {corpus.context}.")
    if first + count > len(corpus):
        raise ConfigError(
            f"evaluation.skip {config.skip} and evaluation.tokens {config.tokens} ask for more held-out text than the "
            f"{corpus.tokens} tokens of {corpus.name}. Lower them, or give more text."
        )
    return range(first, first + count)


def batches_of(
    corpus: Corpus, size: int, sequences: range, device: torch.device, world: World, what: str = "measuring"
) -> Iterator[TokenBatch]:
    """This process's batches: every process takes its turn.

    Args:
        what: the label of the progress shown.
    """
    starts = range(world.rank * size, len(sequences), world.size * size)
    with counting(what, len(starts), None if world.is_first else False, unit="batches") as advance:
        for start in starts:
            yield corpus.batch(sequences[start : start + size]).to(device)
            advance(1)


def _normed(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:])


@torch.no_grad()
def site_means(
    model: LanguageModel,
    spots: Sequence[Spot],
    corpus: Corpus,
    config: EvaluationConfig,
    sequences: range,
    world: World,
) -> dict[Spot, Means]:
    """The mean activation of each site over the tokens that count for it."""
    model.attend_within(corpus.layout.ends)
    totals = {spot: [torch.zeros(model.width(spot[0]), dtype=torch.float64) for _ in range(2)] for spot in spots}
    counts = {spot: torch.zeros((), dtype=torch.int64) for spot in spots}
    recorded = {read for site, counting in spots for read in (site, *counting.sites)}
    with world.together("evaluating"):
        for batch in batches_of(corpus, config.batch, sequences, model.device, world, "mean activations"):
            clean = model.clean(batch.tokens, record=recorded)
            for (site, counting), (raw, normed) in totals.items():
                mask = counting.of_these(clean, batch.mask)
                counts[site, counting] += mask.sum().cpu()
                kept = clean.activations[site][mask].float()
                raw += kept.sum(0, dtype=torch.float64).cpu()
                normed += _normed(kept).sum(0, dtype=torch.float64).cpu()
    world.add([*counts.values(), *(total for pair in totals.values() for total in pair)])
    return {
        spot: Means(*((total / counts[spot]).float().to(model.device) for total in pair))
        for spot, pair in totals.items()
    }


def fit_sums(activation: Activation, estimate: Activation, means: Means, mask: TokenMask) -> dict[str, Tensor]:
    """Sum what the explained variances are made of: error and variance are squared L2 norms per token."""
    sums: dict[str, Tensor] = {}
    x, y = activation.float(), estimate.float()
    for suffix, truth, guess, mean in (
        ("", x, y, means.raw),
        ("_layernorm", _normed(x), _normed(y), means.layernorm),
    ):
        error = (truth - guess).square().sum(-1).where(mask, 0.0)
        variance = (truth - mean).square().sum(-1).where(mask, 0.0)
        sums[f"error{suffix}"] = error.sum(-1)
        sums[f"variance{suffix}"] = variance.sum(-1)
        sums[f"unexplained_share{suffix}"] = torch.where(mask, error / variance.clamp_min(1e-12), 0.0).sum(-1)
    return sums


@dataclass(frozen=True)
class Effect:
    """Outcome of a spliced pass."""

    final: Activation
    downstream: dict[str, Tensor]
    """Squared error and cosine at each later site, summed per sequence."""


def _splice(
    model: LanguageModel, clean: Clean, site: Site, estimate: Activation, later: tuple[Site, ...], mask: TokenMask
) -> Effect:
    return effect_of(SplicedPass(model, site, later).run(clean, estimate, mask), clean, later, mask)


def effect_of(spliced: Spliced, clean: Clean, later: tuple[Site, ...], mask: TokenMask) -> Effect:
    downstream = {}
    for s in later:
        rows = zip(spliced.activations[s], clean.activations[s], mask, strict=True)
        downstream[f"downstream_mse.{s.name}"] = torch.stack(
            [squared_error(a[None], b[None], m[None]) for a, b, m in rows]
        )
        cosines = cosine_similarity(spliced.activations[s].float(), clean.activations[s].float(), dim=-1)
        downstream[f"downstream_cosine.{s.name}"] = cosines.where(mask, 0.0).sum(-1)
    return Effect(final_of(spliced), downstream)


def final_of(recorded: Clean | Spliced) -> Activation:
    assert recorded.final is not None
    return recorded.final


def prediction_sums(compared: Comparison, mask: TokenMask) -> dict[str, Tensor]:
    return {
        "tokens": mask.sum(-1),
        "predictions": compared.predicts.sum(-1),
        "kl": compared.kl.sum(-1),
        "ce_clean": compared.ce_clean.sum(-1),
        "ce_spliced": compared.ce_spliced.sum(-1),
        "ce_increase": (compared.ce_spliced - compared.ce_clean).sum(-1),
        "top1_agreement": compared.top1_agreement.sum(-1),
        "statistical_distance": compared.statistical_distance.sum(-1),
    }


def mean_ce(sums: Sums, name: str) -> float:
    return float(sums[name].sum() / sums["predictions"].sum())


def intervals_of(
    sums: Sums, config: EvaluationConfig, further: Mapping[str, Metric] | None = None
) -> dict[str, Interval]:
    """Every metric that there are sums for."""
    metrics = (
        METRICS | {name: Metric(name) for name in sums if name.partition(".")[0] in DOWNSTREAM} | dict(further or {})
    )
    intervals = {}
    for name, metric in metrics.items():
        if metric.numerator not in sums:
            continue
        ratio = bootstrap_ratio(sums[metric.numerator], sums[metric.denominator], config.bootstrap, config.seed)
        intervals[name] = (
            Interval(low=1 - ratio.high, high=1 - ratio.low, estimate=1 - ratio.estimate)
            if metric.complement
            else ratio
        )
    return intervals


def _summarise(
    place: Place,
    sae: SAE,
    collected: Mapping[int | None, Collector],
    ablations: Mapping[str, Collector],
    config: EvaluationConfig,
    facts: Mapping[str, Any],
) -> Evaluation:
    sums, site = collected[None].sums(), place.writes
    prefixes: dict[str, Metric] = {}
    for length, collector in collected.items():
        for name, metric in OF_PREFIX.items() if length is not None else ():
            sums[f"{name}.{length}"] = collector.sums()[metric.numerator]
            prefixes[f"{name}.{length}"] = replace(metric, numerator=f"{name}.{length}")
    intervals = intervals_of(sums, config, prefixes)
    ablated = (
        mean_ce(ablations[kind].sums(), "ce_spliced") if kind in ablations else math.nan for kind in ("mean", "zero")
    )
    baselines = Baselines(mean_ce(sums, "ce_clean"), *ablated)
    tokens, reads = int(sums["tokens"].sum()), None if place.reads == site else place.reads
    facts = {**facts, **share_left_out(sums)}
    return Evaluation(
        site, sae.d_sae, collected[None].firings(), tokens, intervals, baselines, sums, facts=facts, reads=reads
    )


def share_left_out(sums: Sums) -> dict[str, float]:
    """`left_out`, the share of the text's tokens that are left out for their norm; empty where none would be."""
    if "left_out" not in sums:
        return {}
    left_out = float(sums["left_out"].sum())
    return {"left_out": left_out / max(1.0, left_out + float(sums["tokens"].sum()))}
