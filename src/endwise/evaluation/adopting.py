"""Adoption: a run folder made of a finished SAE of anybody's, so that all that reads runs can read it."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from endwise.common.digests import cache_folder, of_file, of_text
from endwise.common.errors import ConfigError, EndwiseError, ModelError
from endwise.common.files import PARTIAL, cannot_write, check_can_write, expanded, there_is
from endwise.common.hub import shown
from endwise.config.adopted import AdoptedConfig
from endwise.config.places import Recipe
from endwise.config.run import DataConfig, EvaluationConfig, ModelConfig
from endwise.dictionaries import SAE
from endwise.evaluation.inspecting import Inspected, belonging, inspect, kept, text_for
from endwise.evaluation.provenance import beginning, described, report_once
from endwise.formats import Stored, format_at, here, located, on_hub, processing_remark
from endwise.models.language_model import LanguageModel
from endwise.models.loading import load_model
from endwise.runs.folder import RunFolder
from endwise.tokens import Corpora, check_readable, corpora_for
from endwise.tokens.loading import EMBEDDED

SETTINGS = (".json", ".yaml", ".yml")
"""Files beside weights that say what they are."""
LARGEST_SETTINGS, LONGEST = 1 << 20, 200
"""Bytes of such a file, and characters of a name, at most."""


@dataclass(frozen=True)
class Belonging:
    """Words of whoever gives an SAE on where it belongs."""

    model: str | LanguageModel | None = None
    """None: that of `like`, or the one that the file names."""
    data: str | None = None
    """Text to measure it on, as `data.source` of a recipe; None: that of `like`."""
    site: str | None = None
    """None: the place that the file names."""
    context: int | None = None
    """Tokens per sequence; None: as it was trained, or as the model has."""
    tokens: int | None = None
    """Held-out tokens to measure it on; None: as by default, or all of a shorter text."""
    like: Recipe | None = None
    """Recipe of a run that it is to be compared with, on the same text."""

    def from_anywhere(self) -> "Belonging":
        """The same, with the whole paths of a model and a text on this machine."""
        names = {name: value for name in ("model", "data") if isinstance(value := getattr(self, name), str)}
        there = {name: expanded(value) for name, value in names.items() if value != EMBEDDED}
        return replace(self, **{name: str(path.absolute()) for name, path in there.items() if there_is(path)})

    def key(self, path: str, digest: str) -> str:
        """Name what is adopted, of files with this digest at a path (which says something too), by a digest."""
        model = self.model.name if isinstance(self.model, LanguageModel) else self.model
        own: dict[str, Any] = {**vars(self), "model": model, "like": None}
        if self.like is not None:
            own["like"] = self.like.model_dump(mode="json", include={"model", "data", "evaluation"})
        return of_text(path, digest, json.dumps(own, sort_keys=True))[:16]


def adopt(
    path: str | Path,
    *,
    model: str | LanguageModel | None = None,
    data: str | None = None,
    site: str | None = None,
    out: str | Path | None = None,
    context: int | None = None,
    tokens: int | None = None,
    name: str | None = None,
) -> Path:
    """Make a run folder of a finished SAE in any format, which everything reads that reads runs.

    Args:
        path: a folder or file with it, or its name (see `SAE.load`).
        model: name or path of its model, or a loaded one; None: the one that the file names.
        data: text to measure it on, as `data.source` of a recipe.
        site: its place, where the file names none.
        context: tokens per sequence; None: as it was trained, or as the model has.
        tokens: held-out tokens to measure it on; None: as by default, or all of a shorter text.
        out: the run folder; None: one in the cache, which is found again for the same files and words.
        name: what tables and legends call it; None: the end of its path.

    Returns:
        The run folder.

    Raises:
        ConfigError: it is a run already, or model, text or place are neither given nor said by the file.
        FormatError, HubError: it cannot be read.
        ModelError, SiteError: the model cannot be loaded, or has no such site, or one of another width.
        DataError: the text cannot be read, or is too short.
        RunFolderError: `out` is not free, or cannot be written.
    """
    return adopted(path, Belonging(model, data, site, context, tokens), None if out is None else expanded(out), name)


def adopted(path: str | Path, belongs: Belonging, out: Path | None = None, name: str | None = None) -> Path:
    """See `adopt`."""
    path, belongs = expanded(path), belongs.from_anywhere()
    origin = str(path.absolute()) if on_hub(path) is None else shown(path)
    if RunFolder(path).has_run():
        raise ConfigError(f"{path} is a run folder already. Give it as it is.")
    if path.name == "sae" and RunFolder(path.parent).has_run():
        raise ConfigError(f"{path} is the SAE of the run {path.parent}. Give that.")
    digest, own = digest_of(path), name or "/".join(Path(origin).parts[-2:])
    folder = out or cache_folder() / "adopted" / belongs.key(origin, digest) / re.sub(r"[^\w.-]+", "_", own)[-80:]
    if out is None and RunFolder(folder).has_run():
        report_once(f"{shown(path)}: not a run folder of endwise; it was adopted as {folder}")
        return folder
    RunFolder(folder).check_free()
    check_can_write(folder)
    found = inspect(path)
    ours = found.stored.metadata.get("endwise")
    if belongs.data is None and isinstance(ours, Mapping) and "step" in ours:
        if on_hub(path) is not None:
            RunFolder(path).check_exists()  # which says how to bring a run of ours here
        raise ConfigError(
            f"{path} is the SAE of a run, whose recipe is not beside it. Name the text to measure it on (--data), or "
            "give the run folder."
        )
    if belongs.data is not None:  # what is wrong with the text is known before weights are read
        check_readable(DataConfig.build({"source": belongs.data}, "the options"))
    section, model = model_for(found, belongs)
    place, stored = belonging(found, model, belongs.site)
    sae = SAE.of(stored)
    data, remark = _text(found, model, belongs)
    corpora, evaluation = _corpora(model, data, belongs)
    stated = found.stored.metadata.get("model_name")
    values = {
        "model": section,
        "site": place.reads.name,
        "writes": None if place.writes == place.reads else place.writes.name,
        "dictionary": sae.section(),
        "data": data,
        "evaluation": evaluation,
        "adopted": {
            "name": own,
            "path": origin,
            "format": found.format_name,
            "digest": digest,
            "rule": stored.rule(SAE.layouts()[stored.architecture]),
            "model": str(stated)[:LONGEST] if stated else None,
            "stated_l0": found.stated_l0,
            "remarks": [*_standing(found, stored), *(each for each in (remark, _other_model(stated, model)) if each)],
        },
    }
    config = AdoptedConfig.build(values, f"the metadata of {shown(path)}")
    _write(folder, config, sae, kept(stored.metadata), model, corpora)
    report_once(
        f"{shown(path)}: not a run folder of endwise; adopted as {folder}: {config.objective_name}, "
        f"{found.sae.d_sae:,} features at {place} of {model.name}"
    )
    for remark in config.adopted.remarks:
        report_once(f"! {shown(path)}: {remark}")
    return folder


def is_no_run(path: str | Path) -> bool:
    """True if it is an SAE, by its path or its name (`formats.naming`), or a file that should be one, and no run.

    Raises:
        HubError: see `naming.on_hub`.
    """
    path = expanded(path)
    there = path.is_file() or format_at(path) is not None or on_hub(path) is not None
    return there and not RunFolder(path).has_run()


def digest_of(path: Path) -> str:
    """Digest an SAE's weights, and the settings that lie beside them.

    Raises:
        FormatError: it is a file in no format that is known.
        OSError: a file cannot be read.
    """
    form, place = located(here(path).path)
    weights = form.weights(place)
    if not there_is(weights):
        return of_text(str(weights))  # which is reported as it is read
    beside = {file for folder in (place, weights.parent) if folder.is_dir() for file in folder.iterdir()}
    settings = sorted(
        file for file in beside if file.suffix in SETTINGS and file.is_file() and file.stat().st_size < LARGEST_SETTINGS
    )
    return of_text(form.name, of_file(weights), *(f"{file.name} {of_file(file)}" for file in settings))


def model_for(found: Inspected, belongs: Belonging) -> tuple[ModelConfig, LanguageModel]:
    """Load the model of an SAE.

    Raises:
        ConfigError: neither is it said nor does the file name one.
        ModelError: it cannot be loaded.
    """
    if isinstance(belongs.model, LanguageModel):
        return ModelConfig.build({"name": belongs.model.name}, "the model"), belongs.model
    if belongs.model is None and belongs.like is not None:
        return belongs.like.model, load_model(**belongs.like.model.model_dump())
    if belongs.model is not None:
        section = ModelConfig.build({"name": belongs.model}, "the model")
        return section, load_model(**section.model_dump())
    stated = found.stored.metadata.get("model_name")
    if not isinstance(stated, str):
        raise ConfigError(f"{found.name} is not a run, and names no model. Give one with --model.")
    try:
        section = ModelConfig.build({"name": stated}, "the model")
        return section, load_model(**section.model_dump())
    except EndwiseError as error:
        raise ModelError(
            f"{found.name} names the model {stated!r:.200}, which cannot be loaded "
            f"({' '.join(str(error).split()):.300}). Give the model with --model."
        ) from None


def _text(found: Inspected, model: LanguageModel, belongs: Belonging) -> tuple[DataConfig, str | None]:
    """The section `data`, and what to beware of."""
    if belongs.data is not None:
        return text_for(found, model, belongs.data, belongs.context)
    if belongs.like is None:
        raise ConfigError(f"{found.name} is not a run, and names no text to measure it on. Give one with --data.")
    return belongs.like.data, None


def _corpora(model: LanguageModel, data: DataConfig, belongs: Belonging) -> tuple[Corpora, EvaluationConfig]:
    """The text, and how much of it is measured on."""
    if belongs.like is not None and belongs.data is None and belongs.tokens is None:
        evaluation = belongs.like.evaluation
        return corpora_for(model, data, training_tokens=1, evaluation_tokens=evaluation.needed), evaluation
    evaluation = EvaluationConfig()
    corpora = corpora_for(model, data, training_tokens=1, evaluation_tokens=belongs.tokens or 1)
    tokens = belongs.tokens or min(evaluation.tokens, len(corpora.heldout) * corpora.heldout.context)
    few = min(evaluation.during_training_tokens, tokens)
    return corpora, evaluation.model_copy(update={"tokens": tokens, "during_training_tokens": few})


def _standing(found: Inspected, stored: Stored) -> list[str]:
    """Remarks from reading, less those settled by a known model and place."""
    before, now = processing_remark(found.stored), processing_remark(stored)
    return [each for each in found.remarks if before is None or before not in each] + ([] if now is None else [now])


def _other_model(stated: object, model: LanguageModel) -> str | None:
    """Remark on a file that names another model than it is read with."""
    if not isinstance(stated, str) or stated.rpartition("/")[2].lower() in model.name.lower():
        return None
    return f"It names the model {stated[:LONGEST]}, but is read with {model.name}."


def _write(
    folder: Path, config: AdoptedConfig, sae: SAE, about: dict[str, Any], model: LanguageModel, corpora: Corpora
) -> None:
    """Write a run folder, the whole of it or nothing; of two processes that do it at once, the first.

    Raises:
        RunFolderError: it cannot be written.
    """
    partial = RunFolder(folder.with_name(f".{folder.name}.{os.getpid()}{PARTIAL}"))
    try:
        shutil.rmtree(partial.path, ignore_errors=True)
        partial.create(config)
        partial.describe(config, corpora.describe(), {**described(model, corpora), **beginning(config)})
        sae.save(partial.sae, about)
        partial.note_weights(whole=True)
        with suppress(OSError):
            folder.rmdir()  # an empty one
        partial.path.rename(folder)
    except OSError as error:
        if not RunFolder(folder).has_run():
            raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(partial.path, ignore_errors=True)
