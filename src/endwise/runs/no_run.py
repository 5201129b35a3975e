"""Messages about a path that is no run folder, where one is wanted."""

import shlex
from pathlib import Path

from endwise.common.errors import OtherKind
from endwise.common.hub import shown
from endwise.common.kinds import other_kind
from endwise.config.recipes import shipped
from endwise.formats import format_at


def no_run(path: Path) -> OtherKind:
    """An error that says what is at a path where a run folder is wanted, and what to do."""
    name, way = shown(path), ""
    if name.startswith("hf://"):
        way = f" Bring it here: endwise pull {shlex.quote(name)}; make a run of another SAE: endwise adopt."
    elif (other := shipped(name) or other_kind(path, "run folder")) is not None:
        return other
    elif format_at(path) is not None:
        way = " Make one of the SAE in it: endwise adopt."
    return OtherKind(f"{name} is not a run folder (it holds no config.yaml).{way}")
