"""Which commit a name on the Hugging Face hub stands for, so that what is kept of a data set is kept of that commit."""

import re
from contextlib import suppress

from endwise.common.digests import cache_folder, of_text
from endwise.common.errors import FormatError, RunFolderError
from endwise.common.files import read_json, write_json

SECONDS = 10.0
"""To wait for the hub's answer."""
_COMMIT = re.compile("[0-9a-f]{40}")


def commit_on_hub(name: str, revision: str | None) -> str | None:
    """The commit that a data set's revision is at now; where the hub cannot be asked, the last that it told this cache;
    None: there is none, and what is kept goes by the name alone.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    kept = cache_folder() / "commits" / f"{of_text(name, revision or '')}.json"
    commit = _asked(name, revision)
    if commit is not None:
        with suppress(RunFolderError):
            write_json(kept, {"dataset": name, "revision": revision, "commit": commit})
        return commit
    with suppress(OSError, FormatError):
        found = read_json(kept).get("commit")
        return found if isinstance(found, str) else None
    return None


def _asked(name: str, revision: str | None) -> str | None:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=SECONDS).sha
    except Exception:  # noqa: BLE001  No connection, no such data set: reading it will say what is wrong.
        return None
