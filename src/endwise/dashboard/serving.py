"""From runs to a server: the site is written if it is not there, the model loaded, each SAE put at its site."""

from collections.abc import Callable, Sequence
from pathlib import Path

from endwise.common.errors import RunFolderError
from endwise.dashboard.server import DashboardServer
from endwise.dashboard.site import check_site, default_folder, write_dashboard
from endwise.dashboard.sources import DashboardRun, read_sources
from endwise.dashboard.text import TextReader
from endwise.evaluation.finished import load_sae
from endwise.evaluation.provenance import model_of, pinned
from endwise.features.explanations import EXPLANATIONS_FOLDER
from endwise.features.patterns.files import PATTERNS_FOLDER
from endwise.models.language_model import LanguageModel


def dashboard_server(
    runs: Sequence[str | Path],
    *,
    port: int = 0,
    again: bool = False,
    model: LanguageModel | None = None,
    say: Callable[[str], None] | None = None,
) -> DashboardServer:
    """A server that is ready for `serve_forever`.

    Args:
        runs: as for `write_dashboard`; the site lies where that puts it, and is written if it is not there or older
            than a harvest, explanations or patterns that it shows.
        port: 0 for any that is free.
        again: write the site in any case.
        model: the runs' own, loaded; unset: each run's is loaded, once for all that name the same.
        say: called with what is being done.

    Raises:
        EndwiseError: what `write_dashboard`, `load_model` and `DashboardServer` raise.
    """
    sources = read_sources(runs)
    folder = default_folder([source.path for source in sources])
    if again or not _is_there(folder, max(map(_written, sources))):
        write_dashboard(runs, folder, say=say)
    models: dict[str, LanguageModel] = {}
    readers = []
    for source in sources:
        settings = pinned(source.path, source.config).model.model_dump()
        own = model_of({source.path: source.config}, model or models.get(repr(settings)))
        models[repr(settings)] = own
        sae = load_sae(source.path, source.config, own)
        readers.append(TextReader(own, sae, own.place(source.config.place), source.config.data))
    return DashboardServer(folder, readers, port)


def _written(source: DashboardRun) -> float:
    """Return when what is shown of a run was written last."""
    files = (
        source.harvest.folder / "harvest.json",
        source.path / EXPLANATIONS_FOLDER / "explanations.json",
        source.path / PATTERNS_FOLDER / "patterns.json",
    )
    return max(file.stat().st_mtime for file in files if file.exists())


def _is_there(folder: Path, newest: float) -> bool:
    try:
        check_site(folder)
    except RunFolderError:
        return False
    return (folder / "data" / "site.js").stat().st_mtime >= newest
