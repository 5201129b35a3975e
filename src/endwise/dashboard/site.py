"""A site of static files that shows the features of runs: opened from a disk, or served (`server`).

index.html, *.css, *.js  the page itself, the same for every site
data/site.js             which runs there are, and where their data lies; written last
data/<digest>/<n>/       a run's data (`run_data`), under a digest of all of it
"""

import shutil
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from endwise import __version__
from endwise.analysis.geometry.cosines import MEMORY
from endwise.common.digests import of_files
from endwise.common.errors import RunFolderError
from endwise.common.files import PARTIAL, cannot_write, check_can_write, expanded, write_atomic
from endwise.common.text import printable
from endwise.dashboard.nearest import Dictionary, all_neighbours
from endwise.dashboard.run_data import write_run_data
from endwise.dashboard.scripts import script
from endwise.dashboard.sources import DashboardRun, read_sources
from endwise.features.explanations import read_explanations
from endwise.features.patterns.files import read_patterns

FOLDER = "dashboard"
INDEX = "index.html"
_DATA = "data"
_DIGEST = 16
"""Letters of the folder that holds a site's data."""


def write_dashboard(
    runs: Sequence[str | Path],
    out: Path | str | None = None,
    *,
    memory: int = MEMORY,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write the site of one or several harvested runs. Until its end, a site that was there stays as it was.

    Args:
        runs: run folders; features are compared across those of one model and site.
        out: the folder; unset: `dashboard/` in the run, or beside the first of several.
        memory: bytes that the search for the nearest features may hold beside the dictionaries.
        say: called with what is being done.

    Returns: the page to open.

    Raises:
        ConfigError: no run, or one twice.
        RunFolderError: a folder is no run, was not harvested, or the site cannot be written.
        FormatError: a harvest, explanations, patterns or an SAE cannot be read, or they do not belong together.
    """
    sources = read_sources(runs)
    folder = default_folder([source.path for source in sources]) if out is None else expanded(out)
    check_can_write(folder / _DATA)
    say = say or (lambda _: None)
    partial = folder / _DATA / PARTIAL
    try:
        shutil.rmtree(partial, ignore_errors=True)
        written = _write_runs(sources, partial, memory, say)
        digest = of_files(partial.rglob("*.js"), partial)[:_DIGEST]
        place = folder / _DATA / digest
        if place.exists():  # with the same content, unless someone has taken from it
            shutil.rmtree(place)
        partial.replace(place)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for name, content in assets().items():
        write_atomic(folder / name, content)
    site = {"version": __version__, "data": f"{_DATA}/{digest}", "runs": written}
    write_atomic(folder / _DATA / "site.js", script("site", site))
    for old in (folder / _DATA).iterdir():  # what the site was before
        if old.is_dir() and len(old.name) == _DIGEST and old.name != digest:
            shutil.rmtree(old, ignore_errors=True)
    return folder / INDEX


def default_folder(runs: Sequence[Path]) -> Path:
    """Return where the site of these runs goes."""
    return (runs[0] if len(runs) == 1 else runs[0].parent) / FOLDER


def assets() -> dict[str, bytes]:
    """The files of the page itself, by name."""
    return {
        file.name: file.read_bytes()
        for file in files("endwise.dashboard").joinpath("assets").iterdir()
        if file.name.endswith((".html", ".css", ".js"))
    }


def _write_runs(
    sources: Sequence[DashboardRun], folder: Path, memory: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    say("Searching for the nearest features")
    dictionaries = [
        Dictionary.of(each.sae().W_dec, each.harvest.firings, (each.config.model.name, each.config.written))
        for each in sources
    ]
    neighbours = all_neighbours(dictionaries, memory=memory)
    del dictionaries
    entries = []
    for place, (source, near) in enumerate(zip(sources, neighbours, strict=True)):
        say(f"{source.path}: {source.harvest.d_sae:,} features")
        words = read_explanations(source.path), read_patterns(source.path)
        about = write_run_data(source, folder / str(place), str(place), near, *words)
        facts = {"name": source.name, "folder": str(source.path), **source.facts()}
        shown = {name: printable(fact) if isinstance(fact, str) else fact for name, fact in facts.items()}
        entries.append({**shown, **about})
    return entries


def check_site(folder: Path) -> None:
    """
    Raises:
        RunFolderError: the folder holds no whole site.
    """
    if not (folder / INDEX).exists() or not (folder / _DATA / "site.js").exists():
        raise RunFolderError(f"{folder} holds no dashboard. Write one: endwise dashboard RUN --out {folder}")
