"""The site served to this machine alone, with the model behind it: what fires on a text that someone types, and how a
feature steers it.

Only 127.0.0.1 is listened to. A page of another origin that has its name point here (DNS rebinding) is refused by the
`Host` it was called with, one that posts here by its `Origin`; nothing outside the site's folder is read.
"""

import json
import mimetypes
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from endwise.common.errors import ConfigError, EndwiseError
from endwise.common.remedies import reason, remedy
from endwise.dashboard.site import check_site
from endwise.dashboard.text import TextReader
from endwise.features.intervening import Clamp, Intervention, Steer

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
_ABOUT = "/api/about"
EDITS: Mapping[str, Callable[[int, Any], Intervention]] = {"add": Steer, "set": Clamp}
"""What "how" may be, with a feature and an activation."""


class DashboardServer(ThreadingHTTPServer):
    """Serves one site on 127.0.0.1 until it is shut down.

    Args:
        readers: by the place of the run in the site.
        port: 0 for any that is free; see `url`.

    Raises:
        RunFolderError: the folder holds no site.
        ConfigError: the port is taken, or may not be used.
    """

    daemon_threads = True

    def __init__(self, folder: Path, readers: Sequence[TextReader], port: int = 0) -> None:
        check_site(folder)
        self.folder = folder.resolve()
        self.readers = readers
        self.model_lock = threading.Lock()
        """Hooks are put into the one model while it runs, so one text is read at a time."""
        try:
            super().__init__((HOST, port), _Handler)
        except OverflowError as error:
            raise ConfigError(f"Port {port} of {HOST} cannot be used ({error}). Choose another with --port.") from None
        except OSError as error:
            advice = remedy(error, "choose another with --port")
            raise ConfigError(f"Port {port} of {HOST} cannot be used ({reason(error)}). {advice}") from None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    @property
    def hosts(self) -> set[str]:
        """Names by which a browser on this machine calls the server."""
        port = self.server_address[1]
        names = (HOST, "localhost")
        return {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error of ours."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

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


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: DashboardServer  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "endwise", ""
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  as its caller names it
        """Nothing is said of what goes well."""

    def _answer(self, found: Any) -> None:
        try:
            self._check_caller()
            content, kind = found()
            status = HTTPStatus.OK
        except _Refused as error:
            status, (content, kind) = error.status, _json({"error": str(error)})
        except EndwiseError as error:
            status, (content, kind) = HTTPStatus.BAD_REQUEST, _json({"error": str(error)})
        if status != HTTPStatus.OK:
            self.close_connection = True  # what was sent besides may not have been read
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _check_caller(self) -> None:
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, f"This server answers to {self.server.url} only.")
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower() not in {f"http://{host}" for host in self.server.hosts}:
            raise _Refused(HTTPStatus.FORBIDDEN, "This server answers its own pages only.")

    def _get(self) -> tuple[bytes, str]:
        path = unquote(urlsplit(self.path).path)
        if path == _ABOUT:
            return _json(self.server.about())
        file = self._file(path)
        if file is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "There is no such page.")
        kind = {".js": "text/javascript"}.get(file.suffix) or mimetypes.guess_type(file.name)[0] or "text/plain"
        return file.read_bytes(), f"{kind}; charset=utf-8"

    def _file(self, path: str) -> Path | None:
        """A file of the site, wherever the path tries to lead; None if there is none."""
        if "\0" in path or "\\" in path:
            return None
        file = (self.server.folder / path.lstrip("/")).resolve()
        file = file / "index.html" if file == self.server.folder else file
        return file if file.is_relative_to(self.server.folder) and file.is_file() else None

    def _post(self) -> tuple[bytes, str]:
        answers = {"/api/text": self.server.read_text, "/api/steer": self.server.steer}
        if (answer := answers.get(urlsplit(self.path).path)) is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "There is no such page.")
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Send JSON (Content-Type: application/json).")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "Say how long the text is (Content-Length).")
        if len(length) > 9 or int(length) > LARGEST_REQUEST:
            most = f"{LARGEST_REQUEST:,}"
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The text has more than {most} bytes. Shorten it.")
        try:
            asked = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise _Refused(HTTPStatus.BAD_REQUEST, "That is not JSON.") from None
        return _json(answer(asked))


def _json(value: Any) -> tuple[bytes, str]:
    return json.dumps(value, allow_nan=False).encode(), "application/json"
