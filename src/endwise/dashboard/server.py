"""The site served to this machine alone, with the model behind it: what fires on a text that someone types, and how a
feature steers it.

Only 127.0.0.1 is listened to. A page of another origin that has its name point here (DNS rebinding) is refused by the
`Host` it was called with, one that posts here by its `Origin`; nothing outside the site's folder is read.
"""

import mimetypes
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from uvicorn import Config, Server

from endwise.common.errors import ConfigError, EndwiseError, RunFolderError
from endwise.common.remedies import reason, remedy
from endwise.dashboard.site import check_site, default_folder, write_dashboard
from endwise.dashboard.sources import DashboardRun, read_sources
from endwise.dashboard.text import TextReader
from endwise.evaluation.finished import load_sae
from endwise.evaluation.provenance import model_of, pinned
from endwise.features.explanations import EXPLANATIONS_FOLDER
from endwise.features.intervening import Clamp, Intervention, Steer
from endwise.features.patterns.files import PATTERNS_FOLDER
from endwise.models.language_model import LanguageModel

HOST = "127.0.0.1"
LARGEST_REQUEST = 64 << 10
"""Bytes of a request's body."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}
EDITS: Mapping[str, Callable[[int, Any], Intervention]] = {"add": Steer, "set": Clamp}
"""Values of "how", with a feature and an activation."""
mimetypes.add_type("text/javascript", ".js")  # whatever this machine's own table says


class DashboardServer(AbstractContextManager["DashboardServer"]):
    """Serves one site on 127.0.0.1 until it is shut down.

    Args:
        readers: by the place of the run in the site.
        port: 0 for any that is free; see `url`.

    Raises:
        RunFolderError: the folder holds no site.
        ConfigError: the port is taken, or may not be used.
    """

    def __init__(self, folder: Path, readers: Sequence[TextReader], port: int = 0) -> None:
        check_site(folder)
        self.folder = folder.resolve()
        self.readers = readers
        self.model_lock = threading.Lock()
        """Hooks are put into the one model while it runs, so one text is read at a time."""
        try:
            self.socket = socket.create_server((HOST, port))
        except OverflowError as error:
            raise ConfigError(f"Port {port} of {HOST} cannot be used ({error}). Choose another with --port.") from None
        except OSError as error:
            advice = remedy(error, "choose another with --port")
            raise ConfigError(f"Port {port} of {HOST} cannot be used ({reason(error)}). {advice}") from None
        self.server_address = self.socket.getsockname()
        routes = [
            Route("/api/about", lambda _: JSONResponse(self.about())),
            Route("/api/text", _answering(self.read_text), methods=["POST"]),
            Route("/api/steer", _answering(self.steer), methods=["POST"]),
            Mount("/", StaticFiles(directory=self.folder, html=True)),
        ]
        guard = Middleware(BaseHTTPMiddleware, self._guard)
        refusals: Any = {HTTPException: _refused, EndwiseError: _refused}
        app = Starlette(routes=routes, middleware=[guard], exception_handlers=refusals)
        # The parts are named, so that they are the same whatever else is installed.
        self._server = Server(
            Config(app, http="h11", loop="asyncio", ws="none", lifespan="off", log_level="error", server_header=False)
        )

    def serve_forever(self) -> None:
        self._server.run([self.socket])

    def shutdown(self) -> None:
        self._server.should_exit = True

    def server_close(self) -> None:
        self.socket.close()

    def __exit__(self, *_: object) -> None:
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    @property
    def hosts(self) -> set[str]:
        """Names by which a browser on this machine calls the server."""
        port = self.server_address[1]
        names = (HOST, "localhost")
        return {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())

    async def _guard(self, request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        origin = request.headers.get("Origin")
        if request.headers.get("Host", "").lower() not in self.hosts:
            found: Response = JSONResponse({"error": f"This server answers to {self.url} only."}, 403)
        elif origin is not None and origin.lower() not in {f"http://{host}" for host in self.hosts}:
            found = JSONResponse({"error": "This server answers its own pages only."}, 403)
        else:
            found = await answer(request)
        found.headers.update(HEADERS)
        return found

    def about(self) -> dict[str, Any]:
        return {"texts": [{"most_tokens": reader.most_tokens} for reader in self.readers]}

    def read_text(self, asked: object) -> dict[str, Any]:
        """
        Raises:
            ConfigError: not `{"run": place, "text": "..."}`, or the text cannot be read.
        """
        reader, fields = self._asked(asked)
        with self.model_lock:
            return reader.read(fields["text"])

    def steer(self, asked: object) -> dict[str, Any]:
        """
        Raises:
            ConfigError: not `{"run": place, "text": "...", "feature": number, "how": "add", "by": activation,
                "tokens": number}`, or the text cannot be continued so.
        """
        reader, fields = self._asked(asked)
        feature, by, tokens = (fields.get(name) for name in ("feature", "by", "tokens"))
        edit, number = EDITS.get(str(fields.get("how", "add"))), isinstance(by, int | float)
        if edit is None or not number or type(feature) is not int or type(tokens) is not int:
            how = " or ".join(EDITS)
            raise ConfigError(f'Send "feature" and "tokens", whole numbers, "by", a number, and "how": {how}.')
        with self.model_lock:
            return reader.steer(fields["text"], edit(feature, by), tokens)

    def _asked(self, asked: object) -> tuple[TextReader, Mapping[str, Any]]:
        """Return the reader of the run that is asked, and all that is."""
        if not isinstance(asked, Mapping) or not isinstance(asked.get("text"), str):
            raise ConfigError('Send an object with a "text".')
        run = asked.get("run", 0)
        if type(run) is not int or not 0 <= run < len(self.readers):
            raise ConfigError(f'"run" is a number from 0 to {len(self.readers) - 1}; given {run!r:.40}.')
        return self.readers[run], asked


def _refused(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return JSONResponse({"error": str(error)}, 400)
    message = "There is no such page." if error.status_code == 404 else error.detail
    return JSONResponse({"error": message}, error.status_code, error.headers)


def _answering(answer: Callable[[object], Any]) -> Callable[[Request], Awaitable[Response]]:
    async def answered(request: Request) -> Response:
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "Send JSON (Content-Type: application/json).")
        length = request.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise HTTPException(411, "Say how long the text is (Content-Length).")
        if len(length) > 9 or int(length) > LARGEST_REQUEST:
            raise HTTPException(413, f"The text has more than {LARGEST_REQUEST:,} bytes. Shorten it.")
        try:
            asked = await request.json()
        except (ValueError, RecursionError):
            raise HTTPException(400, "That is not JSON.") from None
        return JSONResponse(await run_in_threadpool(answer, asked))

    return answered


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
