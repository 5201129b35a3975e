"""A hub on this machine: what huggingface_hub asks of the real one to read and write repositories of models, with
tokens, private and gated repositories, and failures on demand.
"""

import base64
import hashlib
import json
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

OWNER, TOKEN = "someone", "hf_secretsecretsecretsecret"
LARGE = (".safetensors", ".npz", ".pt", ".pth", ".png")


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    refs: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    """By the commit, each file's content by its path."""

    def commit(self, files, ref="main"):
        told = json.dumps([len(self.commits), sorted((path, oid(content)) for path, content in files.items())])
        sha = hashlib.sha1(told.encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        return sha

    def at(self, revision):
        sha = self.refs.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None

    @property
    def files(self):
        return self.at("main")[1]


@dataclass
class Hub:
    """Contents and settings of a server, and the requests it saw."""

    url: str = ""
    repositories: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)
    """Large files by their SHA-256."""
    misbehave: object = None
    """Called with the handler; True: it has answered in its own way."""
    requests: list = field(default_factory=list)
    """Method and path of each, in order."""
    sent: Counter = field(default_factory=Counter)
    """By path, how often a file's content was downloaded."""
    lock: object = field(default_factory=threading.Lock)

    def put(self, name, folder, ref="main", **told):
        """Make a repository of what a folder, or a mapping, holds; returns the commit."""
        if isinstance(folder, Path):
            paths = [path for path in folder.rglob("*") if path.is_file()]
            folder = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        repository = self.repositories.setdefault(name, Repository(**told))
        return repository.commit(folder, ref)


def oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer is late by 40 ms
    hub: Hub

    def log_message(self, *arguments):
        pass

    def handle_any(self):
        self.split = urlsplit(self.path)
        self.parts = [unquote(part) for part in self.split.path.strip("/").split("/")]
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.split.path}")
        if self.hub.misbehave is None or not self.hub.misbehave(self):
            self.route()

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815  as the standard library calls them

    def answer(self, value, status=200, **headers):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if not isinstance(value, bytes):
            self.send_header("Content-Type", "application/json")
        for name, each in headers.items():
            self.send_header(name.replace("_", "-"), each)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code=None):
        named = {} if code is None else {"X_Error_Code": code}
        self.answer({"error": f"no {self.headers.get('Authorization')}"}, status, **named)

    @property
    def knows_token(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def route(self):
        parts = self.parts
        if parts[:2] == ["api", "repos"]:
            self.create(json.loads(self.body))
        elif parts[:2] == ["api", "validate-yaml"]:
            self.answer({"errors": [], "warnings": []})
        elif parts[:2] == ["api", "whoami-v2"]:
            self.answer({"name": OWNER, "type": "user"}) if self.knows_token else self.refuse(401)
        elif parts[0] == "objects":
            with self.hub.lock:
                self.hub.objects[parts[1]] = self.body
            self.answer({})
        elif parts[:2] == ["api", "models"]:
            self.of_repository("/".join(parts[2:4]), parts[4] if parts[4:] else "info", parts[5:])
        elif len(parts) < 3:
            self.refuse(404)
        elif parts[1].endswith(".git"):
            self.of_repository(f"{parts[0]}/{parts[1].removesuffix('.git')}", "batch", [])
        else:
            self.of_repository("/".join(parts[:2]), parts[2], parts[3:])

    def create(self, asked):
        name = f"{asked['organization'] or OWNER}/{asked['name']}"
        if not self.knows_token:
            return self.refuse(401)
        if asked["organization"] not in (None, OWNER):
            return self.refuse(403)
        if name in self.hub.repositories:
            return self.answer({"url": f"{self.hub.url}/{name}", "id": name}, 409)
        self.hub.put(
            name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=asked.get("visibility") == "private"
        )
        return self.answer({"url": f"{self.hub.url}/{name}", "id": name})

    def of_repository(self, name, what, rest):
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.knows_token):
            return self.refuse(404 if self.knows_token else 401, "RepoNotFound")
        if repository.gated and not self.knows_token and what != "info":
            return self.refuse(403, "GatedRepo")
        if self.command in ("POST", "PUT") and not self.knows_token:
            return self.refuse(401)
        found = repository.at(rest[0] if rest else "main")
        if found is None and what != "branch":
            return self.refuse(404, "RevisionNotFound")
        return getattr(self, f"of_{what}")(name, repository, found, rest)

    def of_info(self, name, repository, found, _rest):
        siblings = [{"rfilename": path} for path in found[1]]
        self.answer({"id": name, "sha": found[0], "private": repository.private, "tags": [], "siblings": siblings})

    of_revision = of_info

    def of_tree(self, _name, _repository, found, rest):
        below = "/".join(rest[1:])
        kept = [path for path in found[1] if not below or path.startswith(f"{below}/")]
        self.answer([{"type": "file", "path": path, **facts(found[1][path], path)} for path in kept])

    def of_resolve(self, _name, _repository, found, rest):
        path = "/".join(rest[1:])
        if path not in found[1]:
            return self.refuse(404, "EntryNotFound")
        content = found[1][path]
        if self.command == "GET":
            with self.hub.lock:
                self.hub.sent[path] += 1
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        return self.answer(content[start:], 206 if start else 200, X_Repo_Commit=found[0], ETag=f'"{oid(content)}"')

    def of_preupload(self, _name, _repository, found, _rest):
        files = []
        for each in json.loads(self.body)["files"]:
            path = each["path"]
            known = facts(found[1][path], path) if path in found[1] else {}
            there = known.get("lfs", {}).get("oid", known.get("oid"))
            mode = "lfs" if path.endswith(LARGE) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there})
        self.answer({"files": files})

    def of_batch(self, _name, _repository, _found, _rest):
        answered = []
        for each in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/objects/{each['oid']}"}
            answered.append(each if each["oid"] in self.hub.objects else {**each, "actions": {"upload": upload}})
        self.answer({"transfer": "basic", "objects": answered})

    def of_commit(self, name, repository, found, rest):
        files = dict(found[1])
        for line in self.body.splitlines():
            told, value = (json.loads(line)[key] for key in ("key", "value"))
            if told == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif told == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif told == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files, rest[0])
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def of_branch(self, _name, repository, _found, rest):
        repository.refs[rest[0]] = repository.refs["main"]
        self.answer({})


def facts(content, path):
    told = {"size": len(content), "oid": oid(content)}
    if path.endswith(LARGE):
        told["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return told


@contextmanager
def hub_server():
    """Serve a hub."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfIt", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def asked(hub, cache, token=None):
    """Have huggingface_hub ask it, with a cache of its own."""
    from huggingface_hub import close_session, constants

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache),
        }.items():
            patch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        close_session()
        yield hub
    close_session()
