"""Names of SAEs: a local path, `hf://owner/repo[@revision][/path]`, or `release/sae_id` of SAELens's registry.

A name is turned into a local path by `here`, which fetches what is on the hub into huggingface_hub's cache: the files
of that one SAE alone. What exists locally is taken before the registry. A `Path` of a name on the hub has lost one of
its slashes, and is understood all the same.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from endwise.common.errors import HubError
from endwise.common.files import expanded, stays_inside, there_is
from endwise.common.hub import SCHEME
from endwise.formats.fetching import fetched
from endwise.formats.registry_of_saelens import facts, installed, is_unread, shipped

FORM = "hf://owner/name[@revision][/path]"
SHOWN = 5
"""Names listed in an error."""


@dataclass(frozen=True)
class OnHub:
    """An SAE on the hub, or a folder with some."""

    repo: str
    inside: str = ""
    """The path in the repository."""
    revision: str | None = None
    """A branch, tag or commit; None: `main`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the registry that names it, by SAELens's names; its file's own take precedence."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the registry that take precedence over the file's."""

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        return f"hf://{self.repo}{at}{'/' if self.inside else ''}{self.inside}"


@dataclass(frozen=True)
class Here:
    """An SAE on this machine."""

    path: Path
    commit: str | None = None
    """The commit of its repository on the hub; None: it is from no repository."""
    named: OnHub | None = None

    def completed(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return a file's metadata with what the registry adds."""
        return dict(metadata) if self.named is None else {**self.named.facts, **metadata, **self.named.overrides}


def on_hub(name: str | Path) -> OnHub | None:
    """Read a name; None: it is a local path, whether or not there is something.

    Raises:
        HubError: it begins with `hf://` and does not read as such names do; or there is such a release in SAELens's
            registry and no such id in it, or one of a kind that endwise does not read.
    """
    path = Path(name)
    text = path.as_posix()
    if text.startswith(SCHEME) and not there_is(path):
        return _parsed(text)
    head, _, sae_id = text.partition("/")
    if path.is_absolute() or there_is(path) or (release := shipped().get(head) or installed().get(head)) is None:
        return None
    saes = release["saes"]
    if sae_id not in saes:
        near = difflib.get_close_matches(sae_id, saes, n=SHOWN, cutoff=0.4) or list(saes)[:SHOWN]
        more = f" There are {len(saes):,}, e.g. {', '.join(near)}."
        raise HubError(f"SAELens's release {head} has no SAE {sae_id!r:.120}.{more}")
    inside = saes[sae_id][0]
    if unread := is_unread(release, inside):
        raise HubError(f"{text} is {unread}. Use it with SAELens.")
    return OnHub(release["repo"], inside, None, facts(release, sae_id), release.get("overrides", {}))


def _parsed(text: str) -> OnHub:
    owner, _, rest = text.removeprefix(SCHEME).lstrip("/").partition("/")
    named, _, inside = rest.partition("/")
    repo, at, revision = named.partition("@")
    inside = inside.strip("/")
    if not owner or not repo or (at and not revision) or (inside and not stays_inside(inside)):
        raise HubError(f"{text!r:.200} must read {FORM}. Correct it.")
    return OnHub(f"{owner}/{repo}", inside, unquote(revision) or None)


def at_commit(name: str | Path, commit: str) -> Path:
    """Return a name on the hub at a commit, unless it says a revision itself; a local path as it is."""
    found = on_hub(name)
    if found is None or found.revision is not None:
        return Path(name)
    return Path(str(replace(found, revision=commit)))


def here(name: str | Path) -> Here:
    """Return where the SAE of a name is on this machine; what is on the hub is fetched, unless it is in the cache.

    Raises:
        HubError: see `on_hub` and `fetched`.
    """
    path = expanded(name)
    found = on_hub(path)
    if found is None:
        return Here(path)
    snapshot, inside = fetched(found.repo, found.inside, found.revision, str(found))
    return Here(snapshot / inside, snapshot.name, found)
