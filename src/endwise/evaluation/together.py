"""Measures dictionaries at several places of one model with all reconstructions in place at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from endwise.common.axes import AnyWidth, TokenMask
from endwise.common.processes import ALONE, World
from endwise.common.statistics import Interval
from endwise.config.run import EvaluationConfig
from endwise.dictionaries import SAE, Latents, at_inference
from endwise.evaluation.counting import Counting
from endwise.evaluation.measure import (
    Baselines,
    Collector,
    Evaluation,
    batches_of,
    effect_of,
    final_of,
    fit_sums,
    intervals_of,
    mean_ce,
    prediction_sums,
    residuals_after,
    sequences_of,
    share_left_out,
    site_means,
)
from endwise.evaluation.text_check import facts_of_text
from endwise.models.joint_pass import JointPass
from endwise.models.language_model import Clean, LanguageModel
from endwise.models.sites import Place, Site
from endwise.tokens import Corpus


@dataclass(frozen=True)
class AmongOthers:
    """A dictionary's own numbers in a pass that has the others' reconstructions in place."""

    d_sae: int
    alive: int
    metrics: Mapping[str, Interval]
    """`l0`, and the explained variances of what the model computes there in that pass."""

    def to_json(self) -> dict[str, Any]:
        estimates = {name: interval.estimate for name, interval in self.metrics.items()}
        return {"d_sae": self.d_sae, "alive": self.alive, **estimates}


@dataclass(frozen=True, repr=False)
class JointEvaluation(Evaluation):
    """Dictionaries of several places together: `site` is the first that is written, `l0`, `d_sae` and `alive` are sums,
    baselines have all places at their means, or at zero. Downstream metrics are those after the first place; where a
    later one writes, of what it puts there.
    """

    places: Mapping[str, AmongOthers] = field(default_factory=dict)

    def _record(self) -> dict[str, Any]:
        own = {name: each.to_json() for name, each in self.places.items()}
        return {**super()._record(), "site": " + ".join(own), "places": own}


@dataclass(frozen=True)
class _Seen:
    """Sums that one pass over the text has collected."""

    whole: Collector
    ablated: Mapping[str, Collector]
    places: Mapping[Place, Collector]

    def merge(self, world: World) -> None:
        for collector in (self.whole, *self.ablated.values(), *self.places.values()):
            collector.merge(world)


def measure_together(
    model: LanguageModel,
    saes: Mapping[Place, SAE],
    corpus: Corpus,
    config: EvaluationConfig,
    *,
    baselines: bool = True,
    world: World = ALONE,
) -> JointEvaluation:
    """Evaluate all SAEs in one spliced pass, in which each encodes what the model computes with the earlier ones'
    reconstructions in place. `measure` evaluates each alone, and says what the arguments are. A token that one of them
    leaves out for its norm counts for none.
    """
    sequences = sequences_of(corpus, config)
    sites = sorted(place.writes for place in saes)
    counting = Counting.of(saes.items())
    found_means = site_means(model, [(site, counting) for site in sites], corpus, config, sequences, world)
    means = {site: each for (site, _), each in found_means.items()}
    later = residuals_after(model, sites[0])
    recorded = {*sites, *later, *(place.reads for place in saes)}
    constants = {"mean": {site: means[site].raw for site in sites}} if baselines else {}
    constants |= {"zero": {site: torch.zeros_like(means[site].raw) for site in sites}} if baselines else {}
    seen = _Seen(Collector(), {kind: Collector() for kind in constants}, {place: Collector() for place in saes})
    with world.together("evaluating"), torch.no_grad(), at_inference(saes.values()):
        for batch in batches_of(corpus, config.batch, sequences, model.device, world):
            clean = model.clean(batch.tokens, record=recorded, final=True)
            found: dict[Place, Latents] = {}
            mask = counting.of_these(clean, batch.mask)
            functions = {place: partial(_reconstruct, found, place, sae) for place, sae in saes.items()}
            joint = JointPass(model, functions, later).run(clean, {}, mask)
            for place, at in joint.at.items():
                seen.places[place].add_latents(found[place], mask)
                fitted = fit_sums(at.found, at.value, means[place.writes], mask)
                seen.places[place].add({**fitted, "tokens": mask.sum(-1)})
            effect = effect_of(joint.spliced, clean, later, mask)
            finals = [effect.final, *(_at(model, clean, values, mask) for values in constants.values())]
            compared = model.readout.compare(final_of(clean), finals, batch.tokens, mask)
            seen.whole.add(prediction_sums(compared[0], mask) | effect.downstream)
            seen.whole.add({"left_out": (batch.mask & ~mask).sum(-1)} if counting.limits else {})
            for collector, comparison in zip(seen.ablated.values(), compared[1:], strict=True):
                collector.add(prediction_sums(comparison, mask))
    seen.merge(world)
    known = {"asked_tokens": config.tokens, **facts_of_text(model, corpus)}
    return _summarised(saes, seen, config, corpus.text_digest(sequences), known)


def _reconstruct(found: dict[Place, Latents], place: Place, sae: SAE, x: AnyWidth, _mask: TokenMask) -> AnyWidth:
    found[place] = latents = sae.encode(x)
    return sae.reconstruct(latents, x)


def _at(model: LanguageModel, clean: Clean, constants: Mapping[Site, Tensor], mask: TokenMask) -> Tensor:
    values = {site: each.to(model.dtype).expand_as(clean.activations[site]) for site, each in constants.items()}
    return final_of(JointPass(model, {}).run(clean, values, mask).spliced)


def _summarised(
    saes: Mapping[Place, SAE], seen: _Seen, config: EvaluationConfig, text: str, facts: Mapping[str, Any]
) -> JointEvaluation:
    own = {place: collector.sums() for place, collector in seen.places.items()}
    sums = {**seen.whole.sums(), "l0": np.sum([each["l0"] for each in own.values()], axis=0)}
    bounds = {kind: mean_ce(collector.sums(), "ce_spliced") for kind, collector in seen.ablated.items()}
    firings = {place: collector.firings() for place, collector in seen.places.items()}
    places = {
        place.name: AmongOthers(saes[place].d_sae, int((firings[place] > 0).sum()), intervals_of(own[place], config))
        for place in sorted(saes)
    }
    return JointEvaluation(
        site=min(place.writes for place in saes),
        d_sae=sum(sae.d_sae for sae in saes.values()),
        firings=np.concatenate([firings[place] for place in sorted(saes)]),
        tokens=int(sums["tokens"].sum()),
        metrics=intervals_of(sums, config),
        baselines=Baselines(mean_ce(sums, "ce_clean"), bounds.get("mean", math.nan), bounds.get("zero", math.nan)),
        sums=sums,
        text=text,
        facts={**facts, **share_left_out(sums)},
        places=places,
    )
