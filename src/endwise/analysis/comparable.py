"""Runs that can be compared: those that differ in what is trained alone, gathered by their setting."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from endwise.analysis.kept_apart import with_digests
from endwise.common.errors import RunFolderError
from endwise.common.files import expanded
from endwise.common.text import model_title, model_titles
from endwise.config.fields import flat, identity
from endwise.config.objective import LABELS, PRESET_TERMS, PRESETS, Kind
from endwise.evaluation.summary import RunSummary
from endwise.runs.folder import RunFolder

HELDOUT_TEXT = "held-out text"
"""What a band is over that is no band over seeds."""


NOT_RUNS = ("trials", "checkpoints", "sae")
"""Folders in which no run is looked for; a sweep's trials are short ones, made to find a coefficient."""


ASIDE = (
    *("model.name", "site", "init_from", "dictionary.size", "dictionary.ratio", "training.tokens"),
    *("seed", "data.seed", "training.learning_rate"),
    "training.alive_window",
)
"""Keys of what a recipe computes that a setting names itself, that runs of a curve may differ in, or of which no number
that is compared depends.
"""


@dataclass(frozen=True)
class Setting:
    """What runs must have in common to be compared."""

    model: str
    site: str
    alive_tokens: int
    tokens: int
    d_sae: int
    started: bool
    """From another SAE."""
    further: tuple[tuple[str, str], ...] = ()
    """Other keys of the recipe, with their values, in which the runs given differ."""

    @classmethod
    def of(cls, run: RunSummary, further: Iterable[tuple[str, str]] = ()) -> "Setting":
        start = run.start is not None
        return cls(run.model, run.site, run.alive_tokens, run.tokens, run.d_sae, start, tuple(further))

    def __str__(self) -> str:
        parts = [f"{self.d_sae:,} features", f"{self.tokens:,} training tokens"]
        parts += ["from another SAE"] if self.started else []
        return ", ".join([*parts, *(f"{key} {value}" for key, value in self.further)])


def comparable(paths: Iterable[str | Path]) -> dict[Setting, list[RunSummary]]:
    """Evaluated runs among and below the paths, in sets that can be compared.

    Raises:
        RunFolderError: there is no run, or one was not measured yet.
        FormatError: what a run holds cannot be read.
    """
    found, methods = _with_methods(runs_in(paths))
    sets: dict[Setting, list[RunSummary]] = {}
    for run, setting in found:
        sets.setdefault(setting, []).append(run)
    for setting, local in methods.local_of(found).items():
        sets[setting] += local
    ordered = sorted(sets, key=lambda s: (s.model, s.site, s.started, s.d_sae, s.tokens, s.further))
    return {setting: sets[setting] for setting in ordered}


def with_settings(folders: Iterable[Path]) -> list[tuple[RunSummary, Setting]]:
    """Each evaluated run with its setting, which tells apart what may not be compared.

    Raises:
        RunFolderError: a folder is no run, or was not measured yet.
        FormatError: what a run holds cannot be read.
    """
    return _with_methods(folders)[0]


def _with_methods(folders: Iterable[Path]) -> tuple[list[tuple[RunSummary, Setting]], "_Methods"]:
    runs = with_digests([(RunSummary.read(path), _recipe(path)) for path in folders])
    keys = sorted({key for _, recipe in runs for key in recipe})
    differing = [key for key in keys if len({recipe.get(key) for _, recipe in runs}) > 1]
    titles = model_titles(run.model for run, _ in runs)
    settings = []
    for run, recipe in runs:
        model = titles[run.model]
        alike = [("model.name", model)] if model != model_title(run.model) else []
        settings.append((run, Setting.of(run, [*alike, *((key, recipe.get(key, "")) for key in differing)])))
    methods = _Methods(settings)
    return [(run, methods.setting(run, setting)) for run, setting in settings], methods


class _Methods:
    """Of each setting and kind, the method that its curve is of; runs of others have settings of their own."""

    def __init__(self, runs: Sequence[tuple[RunSummary, Setting]]) -> None:
        self._runs = runs
        groups: dict[tuple[Setting, str], list[Mapping[str, Any]]] = {}
        for run, setting in runs:
            groups.setdefault((setting, run.kind), []).append(run.method)
        self._main = {place: _main_method(cast("Kind", place[1]), methods) for place, methods in groups.items()}

    def setting(self, run: RunSummary, setting: Setting) -> Setting:
        """That of the run's own method."""
        main = self._main[setting, run.kind]
        differing = [key for key in run.method if run.method[key] != main.get(key)]
        if not differing:
            return setting
        words = ", ".join(f"{key} {json.dumps(run.method[key])}" for key in differing)
        return replace(setting, further=(*setting.further, (LABELS[run.kind], words)))

    def local_of(self, found: Sequence[tuple[RunSummary, Setting]]) -> dict[Setting, list[RunSummary]]:
        """For each setting of a further method the local runs that it is compared with: of the same penalty, if there
        are such, otherwise those of the main method.
        """
        local: dict[Setting, list[RunSummary]] = {}
        for (run, common), (_, own) in zip(self._runs, found, strict=True):
            if own != common and run.kind != "local" and own not in local:
                of_setting = [each for each, setting in self._runs if (setting, each.kind) == (common, "local")]
                main = self._main.get((common, "local"), {})
                for wanted in ({**main, "p": run.method.get("p")}, main):
                    local[own] = [each for each in of_setting if each.method == wanted]
                    if local[own]:
                        break
        return local


def _main_method(kind: Kind, methods: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The preset's where there are such runs, otherwise that of most."""
    preset = {**dict.fromkeys(set().union(*PRESET_TERMS.values()) - PRESET_TERMS[kind], 0.0), **PRESETS[kind]}
    preset |= {"downstream_sites": None, "p": 1.0}

    def is_preset(method: Mapping[str, Any]) -> bool:
        return all(method.get(key) == value for key, value in preset.items())

    counts = Counter(json.dumps(method, sort_keys=True) for method in methods)
    return max(methods, key=lambda method: (is_preset(method), counts[json.dumps(method, sort_keys=True)]))


def _recipe(path: Path) -> dict[str, str]:
    """What a run's recipe holds of what it must have in common with those that it is compared with. Of `evaluation` the
    number of tokens is not, since of that it counts what was measured.
    """
    config = RunFolder(path).config()
    own = identity(config)
    content = flat({key: value for key, value in own.items() if key not in ("objective", "evaluation")})
    content["evaluation.skip"] = config.evaluation.skip
    return {key: json.dumps(value).strip('"') for key, value in content.items() if key not in ASIDE}


def runs_in(paths: Iterable[str | Path]) -> list[Path]:
    """The run folders among and below the paths that were measured, each once, in order.

    A run that is named itself must have been measured; of those that lie below a path, others are passed over.

    Raises:
        RunFolderError: a path is no folder, or has no measured run.
    """
    found: dict[Path, None] = {}
    for path in map(expanded, paths):
        if RunFolder(path).has_run():
            found[path] = None
            continue
        if not path.is_dir():
            raise RunFolderError(f"{path} is no folder. Give run folders, or folders that hold some.")
        below = [file.parent for file in sorted(path.rglob("config.yaml")) if not _aside(file.relative_to(path))]
        measured = [run for run in below if RunFolder(run).evaluation_file.exists()]
        if not measured:
            raise RunFolderError(
                f"{path} holds {len(below)} run folders, none of which was measured. Measure them: endwise evaluate."
                if below
                else f"{path} holds no run folder. Give one, or a folder that holds some."
            )
        found |= dict.fromkeys(measured)
    if not found:
        raise RunFolderError("There is no run to compare. Give run folders, or folders that hold some.")
    return list(found)


def _aside(file: Path) -> bool:
    return any(part in NOT_RUNS for part in file.parts[:-2])


def columns_of(setting: Setting) -> dict[str, Any]:
    """What the rows of one set have in common."""
    return {
        "model": setting.model,
        "site": setting.site,
        "d_sae": setting.d_sae,
        "training_tokens": setting.tokens,
        "started": setting.started,
        "heldout_tokens": setting.alive_tokens,
        **dict(setting.further),
    }
