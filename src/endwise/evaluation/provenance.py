"""Provenance of a run, its text, tokenizer, model's weights and the SAE it began with, compared with what is there now.

When a run starts, digests of all of it are kept in its folder (`digests.json`); whoever reads a run gets model and
text from here, and is refused what the run does not stand on. What an older run's folder does not have is reported as
unknown, in one line. The digest of the SAE itself changes while it is trained: `RunFolder` keeps it.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from endwise.common.digests import of_file, of_tokenizer
from endwise.common.errors import ConfigError, DataError, FormatError, ModelError, RunFolderError
from endwise.common.files import expanded, there_is
from endwise.common.hub import shown
from endwise.common.processes import is_first_process
from endwise.common.text import printable
from endwise.config.adopted import AdoptedConfig
from endwise.config.places import PlacesConfig, Recipe
from endwise.config.run import RunConfig
from endwise.formats import at_commit, here, weights_file
from endwise.models.language_model import LanguageModel
from endwise.models.loading import load_model
from endwise.runs.folder import RunFolder
from endwise.runs.several import place_folder
from endwise.tokens import Corpora, Corpus, corpora_for

TEXTS = {"train": "training text", "heldout": "held-out text"}
PARTS = {**TEXTS, "model": "model weights", "tokenizer": "tokenizer", "init_from": "SAE that it started from"}
"""Words for what a run stands on, by its key in `digests.json`."""
Side = Literal["train", "heldout"]

Runs = Mapping[Path, RunConfig]
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def described(model: LanguageModel, corpora: Corpora) -> dict[str, Any]:
    """Describe what runs that start now have in common in their `digests.json`."""
    return {
        **{side: getattr(corpora, side).digests() for side in TEXTS},
        "model": model.weights_digest(),
        "tokenizer": of_tokenizer(model.tokenizer),
        "commits": {"model": model.commit, "data": corpora.commit},
        "directory": str(Path.cwd()),
    }


def beginning(config: Recipe) -> dict[str, Any]:
    """Describe what a run that starts now has of its own there: the SAE in `init_from`, its commit if it is on the hub,
    and which of its recipe's names are relative paths.

    Raises:
        FormatError: `init_from` is a run whose SAE is not what its training wrote, or holds none.
        HubError: it is on the hub, and not to be had.
    """
    names = {key: name for key, name in _names(config).items() if there_is(Path(name))}
    relative = {key: name for key, name in names.items() if not Path(name).is_absolute()}
    if config.init_from is None:
        return {"init_from": None, "relative": relative}
    found = here(config.init_from)
    commit = {} if found.commit is None else {"init_from_commit": found.commit}
    return {"init_from": _start_digest(found.path), **commit, "relative": relative}


def _start_digest(start: Path) -> str:
    folder = RunFolder(start)
    if folder.has_run():
        return folder.weights_digest()
    return of_file(weights_file(start))


def check_resumed(folder: RunFolder, config: Recipe, now: Mapping[str, Any], corpora: Corpora) -> None:
    """
    Args:
        now: what `described` returns and, of a run that starts from the beginning, `beginning`.

    Raises:
        RunFolderError: the run was started on something else than it would resume on.
    """
    parts = [part for part in PARTS if part in now]
    _check(folder.path, config, {part: now[part] for part in parts}, corpora, parts)
    if folder.digests() or folder.saved_steps():  # else it was killed at its start, and nothing is resumed
        report_unknown({folder.path: _unknown(folder, {part: now[part] for part in parts if part not in TEXTS})})


def check_start(config: RunConfig) -> None:
    """Say so where `init_from` holds another SAE by now than the run in the recipe's folder began with. A start that
    was kept without its SAE is none to be compared.
    """
    start, out = config.init_from, config.out
    if start is not None and out is not None and there_is(weights_file(start)):
        _check(out, config, {"init_from": of_file(weights_file(start))}, None, [])


def model_of(runs: Runs, model: LanguageModel | None = None) -> LanguageModel:
    """The model that runs of one recipe's `model` section were trained with.

    Args:
        model: a loaded one to use instead.

    Raises:
        RunFolderError: its weights or its tokenizer are not those that a run was trained with.
        ModelError, ConfigError: it cannot be loaded.
    """
    path, config = next(iter(runs.items()))
    if model is None:
        with naming_relative(path, config):
            model = load_model(**pinned(path, config).model.model_dump())
    stands_on = {"model": model.weights_digest(), "tokenizer": of_tokenizer(model.tokenizer)}
    unknown = {}
    for each in runs:
        folder = RunFolder(each)
        now = as_recorded(folder, model, stands_on)
        _check(each, runs[each], now, None, list(now))
        unknown[each] = _unknown(folder, now) + ([] if "sae" in folder.digests() else ["SAE"])
    report_unknown(unknown)
    return model


def as_recorded(folder: RunFolder, model: LanguageModel, now: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what there is now, with the weights digested as the run's folder has them, where they can be: those of a
    model made in Python are compared with those of the model that its name gives.
    """
    before = folder.digests().get("model")
    return {**now} if _same(before, now["model"]) is not None else {**now, "model": model.weights_digest(before)}


def corpora_of_runs(
    runs: Runs,
    model: LanguageModel,
    corpora: Corpora | None = None,
    *,
    evaluation_tokens: int,
    training_tokens: int = 0,
    side: Side = "heldout",
) -> Corpora:
    """The text that runs of one recipe's `data` section stand on.

    Args:
        model: `model_of` the runs.
        corpora: loaded ones to use instead; if a run was started on others, this is reported, and what is measured
            on them finds by their digest.
        evaluation_tokens, training_tokens: how much is wanted; of the latter, no less than was trained on is there.
        side: what will be read. A change of the other one is reported.

    Raises:
        RunFolderError: it is not the text that a run was started on.
        DataError: it cannot be read, or is too short.
    """
    path, config = next(iter(runs.items()))
    given = corpora is not None
    if corpora is None:
        with naming_relative(path, config):
            corpora = corpora_for(
                model,
                pinned(path, config).data,
                training_tokens=max(training_tokens, config.training.tokens),
                evaluation_tokens=evaluation_tokens,
            )
    check_texts(runs, corpora, [] if given else [side])
    return corpora


def check_texts(runs: Runs, corpora: Corpora, refused: Sequence[Side]) -> None:
    """
    Args:
        refused: sides that must be what the runs were started on; changes of the others are reported.

    Raises:
        RunFolderError: they are not.
    """
    for path, config in runs.items():
        _check(path, config, dict.fromkeys(TEXTS), corpora, refused)


def heldout_fingerprint(path: Path, corpora: Corpora | None = None) -> str | None:
    """Return the fingerprint of the held-out text that a run is measured on: its own, or of loaded corpora."""
    return RunFolder(path).fingerprint("heldout") if corpora is None else corpora.heldout.fingerprint()


def pinned(path: Path, config: AnyRecipe) -> AnyRecipe:
    """A run's recipe with the hub's commits as they were when it started, where it names none."""
    if isinstance(config, PlacesConfig):
        own = [pinned(place_folder(path, recipe), recipe).init_from for recipe in config.recipes]
        places = [place.model_copy(update={"init_from": each}) for place, each in zip(config.places, own, strict=True)]
        config = config.model_copy(update={"places": tuple(places)})
    digests = RunFolder(path).digests()
    if isinstance(config, RunConfig) and config.init_from and isinstance(at := digests.get("init_from_commit"), str):
        config = config.model_copy(update={"init_from": at_commit(config.init_from, at)})
    commits = digests.get("commits")
    commits = commits if isinstance(commits, dict) else {}
    for section in ("model", "data"):
        part, commit = getattr(config, section), commits.get(section)
        if isinstance(commit, str) and part.revision is None:
            config = config.model_copy(update={section: part.model_copy(update={"revision": commit})})
    return config


def _check(path: Path, config: Recipe, now: Mapping[str, Any], corpora: Corpora | None, refused: Sequence[str]) -> None:
    """Refuse other parts than the run stands on; say so of those that are not `refused`."""
    record = RunFolder(path).digests()
    for part in now:
        corpus = None if corpora is None else getattr(corpora, part, None)
        if corpus is not None:
            same = _same_text(RunFolder(path), part, corpus, config.data.streaming)
        else:
            same = _same(record.get(part), now[part])
        if same is not False:
            continue
        message = f"{path} was started on other {PARTS[part]} than {_place(part, config, corpus)} now."
        if part not in refused:
            report_once(message)
            continue
        another = f"remove {path}, and adopt again" if isinstance(config, AdoptedConfig) else "start a new run"
        raise RunFolderError(
            f"{message} Restore what the run was started on, or {another}.{_relative(path, config, there=True)}"
        )


def _place(part: str, config: Recipe, corpus: Corpus | None) -> str:
    if corpus is not None:
        return f"{corpus.name} holds"
    return f"{shown(config.init_from or '')} holds" if part == "init_from" else f"{config.model.name} has"


def _same(before: object, now: object) -> bool | None:
    """Compare digests; None where one is missing, or they are made of different things (`weights_digest`)."""
    if not isinstance(before, str) or not isinstance(now, str):
        return None
    words = [digest.partition(":")[0] for digest in (before, now) if ":" in digest]
    return None if len(set(words)) > 1 else before == now


def _same_text(folder: RunFolder, side: str, corpus: Corpus, grows: bool) -> bool | None:
    """True if a corpus is the one that the run was started on; one that is read as far as needed may be longer or
    shorter.
    """
    fingerprint, before = folder.fingerprint(side), folder.digests().get(side)
    if not isinstance(before, dict) or not before:
        same = None if fingerprint is None else fingerprint == corpus.fingerprint()
        return None if grows and not same else same
    now = corpus.digests()
    if not grows or before == now:
        return before == now
    counts = [int(count) for count in before if count.isdecimal() and int(count) <= len(corpus.documents)]
    return bool(counts) and corpus.digest_of_first(max(counts)) == before[str(max(counts))]


def _unknown(folder: RunFolder, now: Mapping[str, Any]) -> list[str]:
    """List what there is now, and cannot be compared with what there was."""
    record = folder.digests()
    return [PARTS[part] for part in now if now[part] is not None and _same(record.get(part), now[part]) is None]


def report_unknown(unknown: Mapping[Path, list[str]]) -> None:
    """One line for all runs whose folders do not hold what could be compared."""
    runs = [str(path) for path, parts in unknown.items() if parts]
    if not runs:
        return
    parts = dict.fromkeys(part for found in unknown.values() for part in found)
    which = f"{len(runs)} runs ({runs[0]}, …)" if len(runs) > 1 else runs[0]
    report_once(
        f"{which}: no digest to compare of {', '.join(parts)}, so a change since the run was made cannot be noticed."
    )


_reported: set[str] = set()


def report_once(line: str) -> None:
    """A line on stderr, once."""
    if line not in _reported and is_first_process():
        _reported.add(line)
        print(printable(line), file=sys.stderr, flush=True)


def _names(config: Recipe) -> dict[str, str]:
    """The recipe's names that may be paths."""
    start = None if config.init_from is None else shown(config.init_from)
    names = {"model.name": config.model.name, "data.source": config.data.source, "data.heldout": config.data.heldout}
    names |= {"init_from": start}
    return {key: name for key, name in names.items() if name is not None and name != "embedded"}


@contextmanager
def naming_relative(path: Path, config: Recipe) -> Iterator[None]:
    """Add to an error about a file not found that the path is relative, where it is, and where the run was started."""
    try:
        yield
    except (ConfigError, DataError, FormatError, ModelError) as error:
        if not (hint := _relative(path, config, there=False)):
            raise
        raise type(error)(f"{error}{hint}") from error


def _relative(path: Path, config: Recipe, *, there: bool) -> str:
    """A sentence on the recipe's relative paths, if they lead elsewhere from here than where the run was started.

    Args:
        there: also of those that lead somewhere.
    """
    record, here = RunFolder(path).digests(), str(Path.cwd())
    started, relative = record.get("directory"), record.get("relative")
    if not isinstance(started, str) or not isinstance(relative, dict):
        known, relative = False, {n: name for n, name in _names(config).items() if not expanded(name).is_absolute()}
    else:
        known = True
    if started == here or not RunFolder(path).has_run():
        return ""
    named = [f"{key} ({name})" for key, name in relative.items() if (there and known) or not there_is(Path(str(name)))]
    if not named:
        return ""
    where = f"The run was started in {started}" if known else "The folder where the run was started is unknown"
    verb = "is a relative path" if len(named) == 1 else "are relative paths"
    if not known:
        verb = "may be a relative path" if len(named) == 1 else "may be relative paths"
    return f" {' and '.join(named)} {verb}, looked for in {here}. {where}; run the command there."
