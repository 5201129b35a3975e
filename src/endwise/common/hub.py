"""Asking the Hugging Face hub through huggingface_hub: a line for each way in which it refuses, and no token in any."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from endwise.common.errors import EndwiseError, HubError

SCHEME = "hf:/"
"""Begins a name on the hub, with or without the second slash, which a `Path` loses."""
SECONDS = 10.0
"""Longest wait for an answer that is no file."""
_TOKEN = "Give one that may, in HF_TOKEN or by `hf auth login`"
_REFUSALS = {
    "GatedRepoError": "is gated, and this token, if any, may not read it. Accept its terms on its page. {token}",
    "RepositoryNotFoundError": "is not on the hub, or is private and this token, if any, may not read it. Check the "
    "name. {token}",
    "RevisionNotFoundError": "has no such branch, tag or commit. Check what follows the @",
    "DisabledRepoError": "was disabled by the hub. Choose another",
}
_BY_STATUS = {
    401: "needs a token, or the one that is given is not valid. {token}",
    403: "may not be read or written with this token. {token}",
    409: "was changed by somebody else at the same time. Try again",
    413: "does not take files so large. Push fewer at a time",
    429: "got too many requests from here. Wait some minutes, and try again",
}


def shown(name: str | Path) -> str:
    """Return a name of something on the hub as a user writes it, of a `Path` too; any other as it is."""
    text = Path(name).as_posix()
    return f"hf://{text.removeprefix(SCHEME).lstrip('/')}" if text.startswith(SCHEME) else str(name)


def is_offline(error: Exception) -> bool:
    """Return whether a failure means that the hub was not asked or did not answer, rather than that it refused."""
    names = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "TransportError", "ConnectionError", "TimeoutError"}
    return bool(known & names) or (status is not None and status >= 500)


def answers(ask: Callable[[], object]) -> bool:
    """Ask the hub once, where huggingface_hub would ask again for half a minute, file by file; what it refuses is an
    answer, which reading explains.
    """
    try:
        ask()
    except Exception as error:  # noqa: BLE001  All that huggingface_hub and what it asks through may raise.
        return not is_offline(error)
    return True


@contextmanager
def cache_alone(*, if_so: bool) -> Iterator[None]:
    """Have huggingface_hub read its cache within, and ask for nothing."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or if_so
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Turn what huggingface_hub raises within into one line about `what`. Addresses are left out, which may hold
    passwords, and so is whatever a server says.

    Raises:
        HubError: the hub refused, or could not be asked.
    """
    try:
        with _bars_on_a_terminal():
            yield
    except EndwiseError:
        raise
    except Exception as error:
        cause = error.__cause__  # of a thread that uploads, whose failure huggingface_hub tells in words of its own
        reason = refusal(error) or (refusal(cause) if isinstance(cause, Exception) else None)
        if reason is None:
            raise
        raise HubError(f"{what} {reason}.") from None


@contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    """Leave huggingface_hub's progress bars out of logs and pipes, which they would fill."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            enable_progress_bars()


def refusal(error: Exception) -> str | None:
    """Say why the hub does not give or take something, as the end of a sentence; None: it is another kind of error."""
    names = [kind.__name__ for kind in type(error).__mro__]
    if "OfflineModeIsEnabled" in names:
        return "is not in the cache, and HF_HUB_OFFLINE forbids asking the hub. Unset it, or download it first"
    for name in names:
        if name in _REFUSALS:
            return _REFUSALS[name].format(token=_TOKEN)
    if "HFValidationError" in names:
        return "is not a repository's name, which reads owner/name. Correct it"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        reason = _BY_STATUS.get(status) or "got an error from the hub. Try again later"
        return f"{reason.format(token=_TOKEN)} (HTTP {status})"
    if is_offline(error) or type(error).__module__.partition(".")[0].startswith("httpx"):
        kind = re.sub(r"[^A-Za-z]", "", type(error).__name__)
        return f"cannot be asked for: the hub does not answer ({kind}). Check the network and HF_ENDPOINT"
    if type(error).__module__.startswith("huggingface_hub"):
        return f"got an error from the hub ({type(error).__name__}). Try again later"
    return None
