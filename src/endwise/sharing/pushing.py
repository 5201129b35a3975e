"""Pushing measured runs to a repository of the Hugging Face hub."""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from endwise.analysis.pareto.curves import pareto
from endwise.common.errors import ConfigError, HubError
from endwise.common.hub import asking
from endwise.formats.fetching import files_of
from endwise.formats.naming import on_hub
from endwise.runs.finding import runs_at
from endwise.runs.folder import RunFolder
from endwise.sharing.card import CARD, write_card
from endwise.sharing.layout import OWN, pushed, restored, stage


@dataclass(frozen=True)
class Push:
    """Files that were pushed, or would be."""

    repo: str
    files: dict[str, int]
    """Bytes by the path in the repository."""
    card: str
    commit: str | None = None
    """The commit that holds it; None: nothing was sent."""

    @property
    def name(self) -> str:
        return f"hf://{self.repo}"


def push(
    runs: Iterable[str | Path],
    repo: str,
    *,
    private: bool = False,
    licence: str | None = None,
    revision: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Push runs to a repository, which is made if there is none: one folder a run in SAELens's layout, and a card over
    all runs of the repository, those that were pushed before among them.

    What the hub has already is not sent again: a push that broke off is resumed by the same call, and of a second one
    only what changed is sent. A commit holds all of a push or nothing.

    Args:
        runs: measured run folders, each called as no other.
        repo: `owner/name`.
        private: whether a repository that is made is private; one that is there stays what it is.
        licence: identifier of the hub's, e.g. `mit`.
        revision: a branch, made if there is none; unset: `main`.
        dry_run: only say what would be pushed, of these runs alone; the hub is not asked.

    Raises:
        ConfigError: a name is none, or two runs have one name.
        RunFolderError, FormatError: a run cannot be read, or was not measured.
        HubError: the hub cannot be asked, or does not take it.
    """
    paths = runs_at(
        runs,
        lambda run: RunFolder(run).evaluation_file.exists(),
        lacking="was measured",
        remedy="Measure them: endwise evaluate.",
    )
    named = on_hub(f"hf://{repo.removeprefix('hf://')}")
    if named is None or named.inside or named.revision is not None:
        raise ConfigError(f"Push to owner/name; given {repo!r:.200}. Name the branch with --revision.")
    names = [path.resolve().name for path in paths]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"Two runs are called {twice[0]}, and each is a folder of the repository. Rename one.")
    for path in paths:
        RunFolder(path).check_exists()
    with tempfile.TemporaryDirectory(prefix="endwise-push-") as scratch:
        staging = Path(scratch) / "staging"
        staging.mkdir()
        for path, name in zip(paths, names, strict=True):
            stage(path, staging / name)
        before = _there(named.repo, revision, private, names, Path(scratch)) if not dry_run else None
        _card(staging, Path(scratch), named.repo, before, licence)
        files = {path.relative_to(staging).as_posix(): path for path in sorted(staging.rglob("*")) if path.is_file()}
        commit = None if dry_run else _sent(staging, named.repo, revision, names)
        sizes = {name: path.stat().st_size for name, path in files.items()}
        return Push(named.repo, sizes, (staging / CARD).read_text(encoding="utf-8"), commit)


def _there(repo: str, revision: str | None, private: bool, names: Sequence[str], scratch: Path) -> str | None:
    """Make the repository where there is none, and fetch what the card needs of its other runs; returns its card."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    with asking(f"hf://{repo}"):
        api = HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        files = files_of(repo, revision)
        others = [f"{file.partition(f'/{OWN}/')[0]}/{OWN}/*" for file in files if f"/{OWN}/config.yaml" in file]
        others = [each for each in others if each.partition("/")[0] not in names]
        if others:
            found = snapshot_download(repo, revision=revision, allow_patterns=others)
            for run in pushed(Path(found)):
                if run.name not in names:
                    restored(run, scratch / "runs" / run.name)
        if CARD not in files:
            return None
        return Path(hf_hub_download(repo, CARD, revision=revision)).read_text(encoding="utf-8")


def _card(staging: Path, scratch: Path, repo: str, before: str | None, licence: str | None) -> None:
    """Write the card over the staged runs and those that are in the repository."""
    for run in pushed(staging):
        restored(run, scratch / "runs" / run.name)
    write_card(pareto([scratch / "runs"]), staging, repo, before, licence)


def _sent(staging: Path, repo: str, revision: str | None, names: Sequence[str]) -> str:
    from huggingface_hub import HfApi

    with asking(f"hf://{repo}"):
        commit = HfApi().upload_folder(
            repo_id=repo,
            folder_path=staging,
            revision=revision,
            commit_message=f"endwise: {', '.join(names)}"[:200],
            delete_patterns=[f"{name}/*" for name in names],
        )
    if not commit.oid:
        raise HubError(f"hf://{repo}: the hub names no commit. Push again.")
    return commit.oid
