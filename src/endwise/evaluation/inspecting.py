"""An SAE of anybody's: what its file says it is, measured on a little text, and held to what the file states."""

import math
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from endwise.common.errors import ConfigError, FormatError, SiteError
from endwise.common.files import expanded, there_is
from endwise.common.hub import shown
from endwise.common.remarks import not_as_stated
from endwise.config.run import DataConfig, EvaluationConfig
from endwise.dictionaries import SAE
from endwise.evaluation.measure import Evaluation, measure
from endwise.formats import FORMATS, Stored, here, located, stored_at
from endwise.models.language_model import LanguageModel
from endwise.models.sites import ARROW, Place
from endwise.runs.finding import refuse_several
from endwise.tokens import corpora_for

TOO_FAR = 4.0
"""Factor between a measured and a stated L0 that is refused."""
ROWS, SAME = 64, 1e-4
"""Random inputs by which what was written is compared with what was read, and the largest difference, as a share of the
root mean square, that is taken for rounding of another order of sums."""


@dataclass(frozen=True)
class Inspected:
    """Contents of a file, as it says itself."""

    name: str
    """The path, or the name on the hub."""
    format_name: str
    weights: Path
    stored: Stored
    rule: str
    """The function, in symbols."""
    sae: SAE
    remarks: tuple[str, ...] = ()

    @property
    def place(self) -> str | None:
        """The place that it says it belongs to, as `Place.name` writes it; None: it does not."""
        reads, writes = (self.stored.metadata.get(name) for name in ("hook_name", "hook_name_out"))
        if not isinstance(reads, str):
            return None
        return f"{reads}{ARROW}{writes}" if isinstance(writes, str) and writes != reads else reads

    @property
    def stated_l0(self) -> float | None:
        """The mean number of active features that the file, or its path, states."""
        of = self.stored.metadata
        stated = of.get("stated_l0", of.get("l0"))
        known = isinstance(stated, int | float) and not isinstance(stated, bool) and 0 < stated < math.inf
        return float(stated) if known else None

    @property
    def bos(self) -> bool:
        """True where it was trained on sequences that start with BOS."""
        return self.stored.metadata.get("prepend_bos") is True

    def to_json(self) -> dict[str, Any]:
        """All that `lines` says."""
        sae, of = self.sae, self.stored.metadata
        return {
            "name": self.name,
            "format": self.format_name,
            "architecture": self.stored.architecture,
            "transcoder": self.stored.transcodes,
            "d_in": sae.d_in,
            "d_out": sae.d_out,
            "d_sae": sae.d_sae,
            "place": self.place,
            "model": of.get("model_name"),
            "rule": self.rule,
            "stated_l0": self.stated_l0,
            "remarks": list(self.remarks),
        }

    def lines(self) -> list[str]:
        """Say what it is, a line for each fact."""
        sae, of = self.sae, self.stored.metadata
        widths = f"width {sae.d_in}" if sae.d_in == sae.d_out else f"{sae.d_in} to {sae.d_out}"
        kind = "transcoder" if self.stored.transcodes else "SAE"
        belongs = f"{self.place or 'unknown':.160} of {of.get('model_name', 'an unknown model')!s:.80}"
        about = [f"{name} {of[name]!s:.80}" for name in ("context_size", "prepend_bos", "hf_hook_name") if name in of]
        stated = [] if self.stated_l0 is None else [f"states: L0 {self.stated_l0:g}"]
        return [
            f"{self.name}: {self.format_name}, a {self.stored.architecture} {kind} of {sae.d_sae:,} features, {widths}",
            ", ".join([f"place: {belongs}", *about]),
            f"read as: {self.rule}",
            *stated,
            *(f"! {remark}" for remark in self.remarks),
        ]


def inspect(path: str | Path) -> Inspected:
    """Read an SAE in any format, and return the rule by which it was read.

    Raises:
        FormatError, HubError: see `SAE.load`.
        RunFolderError: it is a folder of runs.
    """
    path = expanded(path)
    form, place = located(here(path).path)
    if not there_is(form.weights(place)):
        refuse_several(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stored = stored_at(path, SAE.layouts())
    layout = SAE.layouts()[stored.architecture]
    remarks = tuple(dict.fromkeys(str(each.message) for each in caught if each.category is UserWarning))
    return Inspected(shown(path), form.name, form.weights(place), stored, stored.rule(layout), SAE.of(stored), remarks)


def belonging(found: Inspected, model: LanguageModel, site: str | None = None) -> tuple[Place, Stored]:
    """Find the place of an SAE in a model, and what it is there: that of a model which TransformerLens processed as it
    reads the model as it is.

    Args:
        site: the place, where the file says none or another is meant.

    Raises:
        ConfigError: no place is given.
        SiteError: the model has no such site, or one of another width.
        FormatError: see `Stored.with_value_bias`.
    """
    if (name := site or found.place) is None:
        raise ConfigError(f"{found.name} does not say where it belongs. Name the place with --site.")
    try:
        place = model.place(name)
    except SiteError as error:
        if site is not None:
            raise
        raise SiteError(f"{found.name} says that it belongs elsewhere: {error} Name the place with --site.") from None
    sae, about = found.sae, {**found.stored.metadata, "hook_name": place.reads.name}
    for what, at, width in (("reads", place.reads, sae.d_in), ("writes", place.writes, sae.d_out)):
        if model.width(at) != width:
            raise SiteError(
                f"{found.name} {what} activations of width {width}, and {at} of {model.name} has width "
                f"{model.width(at)}. Give the model and the site that it was trained on."
            )
    about.setdefault("model_name", model.name)
    about["hook_name_out"] = place.writes.name
    if place.writes == place.reads:
        del about["hook_name_out"]
    stored = replace(found.stored, metadata=about)
    if stored.lacks_value_biases:
        bias = model.value_bias(place.reads.layer).cpu()
        stored = stored.with_value_bias(bias, SAE.layouts()[stored.architecture])
    return place, stored


def text_for(
    found: Inspected, model: LanguageModel, source: str, context: int | None = None
) -> tuple[DataConfig, str | None]:
    """Return the text of a source as an SAE was trained to read it, as far as its file says: with BOS in front, in
    sequences as long; and what to beware of.

    Args:
        source: as `data.source` of a recipe.
        context: tokens per sequence, instead.
    """
    has_bos = getattr(model.tokenizer, "bos_token_id", None) is not None
    lacks_bos = f"It was trained on text that begins with BOS, but {model.name} has no BOS."
    stated = found.stored.metadata.get("context_size")
    if context is None and type(stated) is int and stated > 0:
        context = min(stated, model.context or stated)
    values = {"source": source, "context": context, "prepend_bos": found.bos and has_bos}
    return DataConfig.build(values, source="the options"), lacks_bos if found.bos and not has_bos else None


def measured(
    found: Inspected, model: LanguageModel, data: DataConfig, tokens: int, site: str | None = None
) -> Evaluation:
    """Measure an SAE on the first held-out tokens of some text.

    Args:
        site: see `belonging`.

    Raises:
        ConfigError, SiteError, FormatError: see `belonging`.
        DataError: the text is too short.
    """
    place, stored = belonging(found, model, site)
    corpora = corpora_for(model, data, training_tokens=1, evaluation_tokens=tokens)
    config = EvaluationConfig(tokens=tokens, during_training_tokens=1)
    return measure(model, {"it": (place, SAE.of(stored, model.device))}, corpora.heldout, config)["it"]


def verdict(found: Inspected, evaluation: Evaluation) -> list[str]:
    """Compare what was measured with what is stated, and return what to beware of.

    Raises:
        FormatError: they are so far apart, or the reconstruction so bad, that the file is not read as it was trained,
            or not at its place.
    """
    l0, stated, path = evaluation["l0"], found.stated_l0, found.name
    bounds, remedy = evaluation.baselines, "Check the model, the site and the text, and do not use this reading."
    if evaluation["explained_variance.pooled"] <= 0:
        raise FormatError(
            f"{path}: read as its file says, it explains {evaluation['explained_variance.pooled']:.3f} of the variance "
            f"at {evaluation.place}, less than the mean does. {remedy}"
        )
    if stated is not None and not 1 / TOO_FAR < max(l0, 1e-9) / stated < TOO_FAR:
        raise FormatError(f"{path}: L0 is {l0:.1f} where {stated:g} is stated. {remedy}")
    remarks = [] if (remark := not_as_stated({"l0": l0, "adopted": {"stated_l0": stated}})) is None else [remark]
    if evaluation["ce_spliced"] > bounds.mean_ablated:
        remarks.append("Spliced in, it does worse than the site's mean: the place may be wrong.")
    return remarks


def convert(path: str | Path, target: str | Path, format_name: str) -> float:
    """Write an SAE in another format, read it back, and return the largest difference of latents and outputs on random
    inputs, as a share of their root mean square.

    Raises:
        FormatError: it cannot be read, the format cannot say it, or what was written is another function.
        ConfigError: there is no such format, or an SAE at the target already.
    """
    form, target = FORMATS[format_name], expanded(target)
    if not form.writes:
        writing = ", ".join(name for name in FORMATS.names() if FORMATS[name].writes)
        raise ConfigError(f"{format_name} can be read but not written. Written are {writing}.")
    if form.weights(target).exists():
        raise ConfigError(f"{form.weights(target)} is there already. Name another place to write to.")
    found = inspect(path)
    return written(found.sae, target, found.stored.metadata, format_name)


def written(sae: SAE, target: Path, metadata: Mapping[str, Any], format_name: str) -> float:
    """Write an SAE in a format, read it back, and return how far it is apart: see `convert`.

    Args:
        metadata: words of the file that it came from.

    Raises:
        FormatError: the format cannot say it, or what was written is another function.
    """
    sae.save(target, kept(metadata), format_name=format_name)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        again = SAE.load(target)
        x = torch.randn(ROWS, sae.d_in, generator=torch.Generator().manual_seed(0))
        both = [(each.encode(x).dense(), each(x)) for each in (deepcopy(sae).cpu(), again)]
    apart = max(
        float((ours - theirs).abs().max() / ours.square().mean().sqrt().clamp_min(1e-12))
        for ours, theirs in zip(*both, strict=True)
    )
    if not apart < SAME:
        raise FormatError(
            f"{target}: read back, latents or outputs differ from the original's by {apart:.2g} of their root mean "
            "square. Do not use it."
        )
    return apart


def kept(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written of the old file's words: all but the versions of what wrote it."""
    return {name: value for name, value in metadata.items() if name != "sae_lens_version"}
