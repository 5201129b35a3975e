"""A package `wandb` that keeps what it is given in a file, and fails or hangs where it is asked to."""

from pathlib import Path

SOURCE = """
import json, os, time
from pathlib import Path
from types import SimpleNamespace

def _act(call, **told):
    with Path(os.environ["STAND_IN"]).open("a") as file:
        file.write(json.dumps({"call": call, **told}) + "\\n")
    if os.environ.get("STAND_IN_RAISES") == call:
        raise OSError("the other end is gone")
    if os.environ.get("STAND_IN_HANGS") == call:
        time.sleep(1000)

class _Run:
    def __init__(self, id):
        self.id, self.summary = id, self

    def log(self, values, step):
        _act("log", step=step, values=values)

    def update(self, values):
        _act("summary", values=values)

    def __setitem__(self, name, value):
        _act("summary", values={name: value})

    def save(self, file, base_path, policy):
        _act("save", file=file)

    def finish(self, exit_code):
        _act("finish", exit_code=exit_code)

def Settings(**_):
    return SimpleNamespace()

def init(**told):
    told.pop("settings")
    _act("init", **told)
    return _Run(told["id"])
"""


def installed(folder: Path) -> Path:
    """A folder for `sys.path` that holds the package."""
    folder.mkdir()
    (folder / "wandb.py").write_text(SOURCE)
    return folder
