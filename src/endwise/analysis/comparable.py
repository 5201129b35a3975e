"""Runs that can be compared: those that differ in what is trained alone, gathered by their setting."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from endwise.common.errors import RunFolderError
from endwise.common.text import model_title, model_titles
from endwise.config.fields import flat, identity
from endwise.config.method import LOCAL, PRESET_METHODS, Method
from endwise.config.objective import PRESET_TERMS, PRESETS
from endwise.evaluation.provenance import PARTS, report_once
from endwise.evaluation.summary import RunSummary
from endwise.runs.finding import Paths, each_path, run_folders
from endwise.runs.folder import RunFolder, parts_of
from endwise.runs.no_run import no_run

HELDOUT_TEXT = "held-out text"
"""Name of what a band is over that is not over seeds."""


ASIDE = (
    *("model.name", "site", "writes", "init_from", "training.tokens"),
    *("seed", "data.seed", "training.learning_rate"),
    "training.alive_window",
)
"""Keys of what a recipe computes that a setting names itself, that runs of a curve may differ in, or of which no number
that is compared depends.
"""


@dataclass(frozen=True)
class Setting:
    """Settings that runs must have in common to be compared."""

    model: str
    site: str
    alive_tokens: int
    tokens: int
    """Training tokens; 0: not known, of SAEs that were trained elsewhere."""
    d_sae: int
    started: bool
    """True if it started from another SAE."""
    further: tuple[tuple[str, str], ...] = ()
    """Other keys of the recipe, with their values, in which the runs given differ."""

    @classmethod
    def of(cls, run: RunSummary, further: Iterable[tuple[str, str]] = ()) -> "Setting":
        start = run.start is not None
        return cls(run.model, run.site, run.alive_tokens, run.tokens, run.d_sae, start, tuple(further))

    def agrees(self, other: "Setting") -> bool:
        """Return whether all that is known of both is the same."""
        known = dict(other.further)
        own = (self.model, self.site, self.alive_tokens, self.d_sae)
        same = own == (other.model, other.site, other.alive_tokens, other.d_sae)
        return same and all(known.get(key, value) == value for key, value in self.further)

    @property
    def place(self) -> tuple[Any, ...]:
        """Order settings: by model, site, start, size and length."""
        return self.model, self.site, self.started, self.d_sae, self.tokens, self.further

    def __str__(self) -> str:
        trained = f"{self.tokens:,} training tokens" if self.tokens else "trained elsewhere"
        parts = [f"{self.d_sae:,} features", trained]
        parts += ["from another SAE"] if self.started else []
        return ", ".join([*parts, *(f"{key} {value}" for key, value in self.further)])


def comparable(paths: Paths, *, together: bool = False) -> dict[Setting, list[RunSummary]]:
    """Evaluated runs among and below the paths, in sets that can be compared.

    Args:
        together: see `runs_in`.

    Raises:
        RunFolderError: there is no run, or one was not measured yet.
        FormatError: what a run holds cannot be read.
    """
    sets: dict[Setting, list[RunSummary]] = {}
    for run, setting in with_settings(runs_in(paths, together=together)):
        sets.setdefault(setting, []).append(run)
    return {setting: sets[setting] for setting in sorted(sets, key=lambda setting: setting.place)}


def with_settings(folders: Iterable[Path]) -> list[tuple[RunSummary, Setting]]:
    """Each evaluated run with its setting, which tells apart what may not be compared.

    Raises:
        RunFolderError: a folder is no run, or was not measured yet.
        FormatError: what a run holds cannot be read.
    """
    runs = with_digests([(RunSummary.read(path), _recipe(path)) for path in folders])
    keys = sorted({key for _, recipe in runs for key in recipe})
    differing = [key for key in keys if len({recipe[key] for _, recipe in runs if key in recipe}) > 1]
    titles = model_titles(run.model for run, _ in runs)
    settings = []
    for run, recipe in runs:
        model = titles[run.model]
        alike = [("model.name", model)] if model != model_title(run.model) else []
        varied = [(key, recipe[key]) for key in differing if key in recipe]
        settings.append((run, Setting.of(run, [*alike, *varied])))
    settings = _beside(settings)
    apart = {}
    for setting in {setting for _, setting in settings}:
        apart |= {run.folder: run for run in distinguished([run for run, of in settings if of == setting])}
    return [(apart[run.folder], setting) for run, setting in settings]


def _beside(runs: Sequence[tuple[RunSummary, Setting]]) -> list[tuple[RunSummary, Setting]]:
    """Put an SAE that was trained elsewhere, training length unknown, among the runs that it can be compared with in
    all else, if these are of one setting.
    """
    found = []
    for run, setting in runs:
        others = {other for _, other in runs if other.tokens and setting.agrees(other)} if not run.tokens else set()
        if len(others) == 1:
            beside = ", ".join(map(str, others))
            report_once(f"{run.folder}: trained elsewhere, training length unknown; shown beside runs of {beside}.")
        found.append((run, others.pop() if len(others) == 1 else setting))
    return found


def distinguished(runs: Sequence[RunSummary]) -> list[RunSummary]:
    """Give each method of a set of runs a key and a label of its own.

    Of several methods with one name the preset's own keeps it, or that of most runs; the label of another says what is
    different. Methods that are no presets are numbered, for their colours.
    """
    named: dict[str, list[Method]] = {}
    for run in runs:
        named.setdefault(run.method.key, []).append(run.method)
    found: dict[tuple[str, str], Method] = {}
    for key, methods in named.items():
        main = _main_method(methods)
        for method in methods:
            if method.digest != main.digest:
                label = f"{method.label}, {_difference(method, main)}"
                method = replace(method, key=f"{key}-{method.digest}", label=label)
            found[key, method.digest] = method
    further = sorted({m.key: m for m in found.values() if not m.is_preset}.values(), key=lambda m: m.place)
    numbers = {method.key: number for number, method in enumerate(further)}
    found = {name: replace(method, number=numbers.get(method.key, 0)) for name, method in found.items()}
    return [replace(run, method=found[run.method.key, run.method.digest]) for run in runs]


def methods_of(runs: Iterable[RunSummary]) -> list[Method]:
    """List the methods of runs that were kept apart: the presets first, as everywhere."""
    return sorted({run.method.key: run.method for run in runs}.values(), key=lambda method: method.place)


def in_order(run: RunSummary) -> tuple[Any, ...]:
    """Sort runs by method, then along its curve, then by seed."""
    return run.method.place, run.knob, run.seeds


def baseline_of(methods: Sequence[Method]) -> Method:
    """Choose what the others are related to: local where it is there, otherwise the first method."""
    return next((method for method in methods if method == LOCAL), methods[0])


def pairs_of(presets: Iterable[tuple[str, str]], methods: Sequence[Method]) -> list[tuple[Method, Method]]:
    """List what claims compare: these pairs of presets, and each further method with the baseline."""
    base = baseline_of(methods)
    pairs = [(PRESET_METHODS[one], PRESET_METHODS[other]) for one, other in presets]
    return [*pairs, *((method, base) for method in methods if not method.is_preset and method != base)]


def _difference(method: Method, main: Method) -> str:
    content, of_main = method.content, main.content
    keys = [key for key in {**content, **of_main} if content.get(key) != of_main.get(key)]
    return ", ".join(f"{key} {json.dumps(content.get(key))}" for key in keys)


def _main_method(methods: Sequence[Method]) -> Method:
    """The preset's where there are such runs, otherwise that of most."""
    key, counts = methods[0].key, Counter(method.digest for method in methods)
    preset: dict[str, Any] = {}
    if key in PRESETS:
        others = set().union(*PRESET_TERMS.values()) - PRESET_TERMS[key]
        preset = {**dict.fromkeys(others, 0.0), **PRESETS[key], "downstream_sites": None, "p": 1.0}

    def is_preset(method: Method) -> bool:
        return all(method.content.get(key) == value for key, value in preset.items())

    return max(methods, key=lambda method: (is_preset(method), counts[method.digest]))


def _recipe(path: Path) -> dict[str, str]:
    """Read from a run's recipe what it must have in common with those that it is compared with. Of `evaluation` the
    number of tokens is not, since of that it counts what was measured.
    """
    config = RunFolder(path).recipe()
    elsewhere = ("objective", "phases", "dictionary", "evaluation", "places", "joint", "inputs", "adopted")
    content = flat({key: value for key, value in identity(config).items() if key not in elsewhere})
    content["evaluation.skip"] = config.evaluation.skip
    return {key: json.dumps(value).strip('"') for key, value in content.items() if key not in ASIDE}


def runs_in(paths: Paths, *, together: bool = False) -> list[Path]:
    """The run folders among and below the paths that were measured, each once, in order. In place of a run of several
    places are those of its places.

    A run that is named itself must have been measured; of those that lie below a path, others are passed over.

    Args:
        together: whether a run of several places comes before its places, as one whose reconstructions are all in
            place.

    Raises:
        RunFolderError: a path is no folder, or has no measured run.
    """
    found: dict[Path, None] = {}
    for path in each_path(paths):
        if RunFolder(path).has_run():
            found[path] = None
            continue
        if not (below := run_folders(path)):
            raise no_run(path)
        measured = [run for run in below if RunFolder(run).evaluation_file.exists()]
        if not measured:
            raise RunFolderError(
                f"{path} holds {len(below)} run folders, none of which was measured. Measure them: endwise evaluate."
            )
        found |= dict.fromkeys(measured)
    if not found:
        raise RunFolderError("There is no run to compare. Give run folders, or folders that hold some.")
    places = {run: [part.path for part in parts_of(run)] for run in found}
    return list(
        dict.fromkeys(each for run in found for each in [*[run] * (together or run in places[run]), *places[run]])
    )


def columns_of(setting: Setting) -> dict[str, Any]:
    """Name what the rows of one set have in common."""
    return {
        "model": setting.model,
        "site": setting.site,
        "d_sae": setting.d_sae,
        "training_tokens": setting.tokens,
        "started": setting.started,
        "heldout_tokens": setting.alive_tokens,
        **dict(setting.further),
    }


SHOWN = 8
"""Digits of a digest."""

Recipe = dict[str, str]


def with_digests(runs: Sequence[tuple[RunSummary, Recipe]]) -> list[tuple[RunSummary, Recipe]]:
    """Add what each run must have in common with those that it is compared with, and the digests of what it stands on.

    A digest that some run's folder does not have (an older version made it) keeps no runs apart; this is reported once.
    """
    found: list[Recipe] = [{} for _ in runs]
    texts = zip(*((run.text, run.heldout) for run, _ in runs), strict=True)  # the most exact first
    for each, text in zip(found, next((same for same in texts if None not in same), ()), strict=False):
        each["held-out text"] = str(text)
    records = [RunFolder(Path(run.folder)).digests() for run, _ in runs]
    for part in ("train", "model", "tokenizer"):
        digests = [_digest(record.get(part)) for record in records]
        if None not in digests and len({str(digest).partition(":")[0] for digest in digests if ":" in str(digest)}) < 2:
            for each, digest in zip(found, digests, strict=True):
                each[PARTS[part]] = str(digest)
    if older := [run.folder for run, _ in runs if run.text is None]:
        which = f"{len(older)} of {len(runs)} runs ({older[0]}, …)" if len(older) > 1 else older[0]
        report_once(
            f"{which}: measured by an older version, so whether its text and SAE are "
            "those of the others and of now cannot be checked. Measure again: endwise evaluate RUN..."
        )
    shown = [{part: digest.rpartition(":")[2][:SHOWN] for part, digest in each.items()} for each in found]
    return [(run, recipe | digests) for (run, recipe), digests in zip(runs, shown, strict=True)]


def _digest(recorded: object) -> str | None:
    """Return a part's digest; of text, that of all its documents, which is the last."""
    if isinstance(recorded, dict):
        recorded = next(reversed(recorded.values()), None)
    return recorded if isinstance(recorded, str) else None
