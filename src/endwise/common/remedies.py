"""Remedies for when the operating system refuses to read or write: one remedy for each of its error numbers."""

import errno
import re
from pathlib import Path

from endwise.common.errors import Unreadable

_ELSEWHERE_TOO: dict[tuple[str, ...], str] = {
    ("ENOSPC",): "Free space on that disk",
    ("EDQUOT",): "Free space there, of which this user's quota is used up",
    ("EACCES", "EPERM"): "Give this user permission",
    ("EROFS",): "Mount that file system, which is read-only, for writing",
    ("ENOLCK",): "Mount that file system with file locks, which network disks often lack",
    ("ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL", "EXDEV"): "Use a local disk, since that file system cannot do this",
    ("EFBIG",): "Raise the limit on the size of a file (ulimit -f), if it is not that file system's own",
    ("ENAMETOOLONG",): "Shorten that path",
    ("ENOENT",): "Check that path: there is no such file or folder",
    ("ENOTDIR",): "Check that path: a part of it is a file, not a folder",
    ("EISDIR",): "Check that path: it is a folder, not a file",
    ("EEXIST", "ENOTEMPTY"): "Move away what is there already",
    ("ELOOP",): "Correct the symbolic links on that path, which lead in a circle",
    ("EIO", "EREMOTEIO"): "Check that path's disk, which reports errors (the system's log, dmesg, says more)",
    ("EUCLEAN", "EBADMSG"): "Check that file system, which is damaged (fsck)",
    ("ESTALE",): "Mount that network disk again, which no longer knows the file, and start again",
    ("ENODEV", "ENXIO", "ENOMEDIUM"): "Check that the disk is connected and mounted",
    ("ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENOTCONN", "ECONNREFUSED", "ECONNRESET"): (
        "Check the connection to that disk or machine, which does not answer"
    ),
    ("EBUSY", "ETXTBSY", "EADDRINUSE"): "End the program that uses it",
}
_ELSEWHERE_NO_BETTER: dict[tuple[str, ...], str] = {
    ("EMFILE",): "Raise the number of files that a process may have open (ulimit -n), or run fewer things at once",
    ("ENFILE",): "Close other programs, since the whole machine has as many files open as it can (fs.file-max)",
    ("ENOMEM",): "Close other programs, since the machine has no memory left",
    ("EAGAIN", "EINTR"): "Start again",
}


def _by_number(remedies: dict[tuple[str, ...], str]) -> dict[int, str]:
    """Map error numbers to remedies; not every system has every number."""
    return {getattr(errno, name): move for names, move in remedies.items() for name in names if hasattr(errno, name)}


_MOVES, _STAYS = _by_number(_ELSEWHERE_TOO), _by_number(_ELSEWHERE_NO_BETTER)
_OTHERWISE = "Check that path, its permissions and its disk"


def remedy(error: BaseException, elsewhere: str | None = None) -> str:
    """Say what can be done about the system's error, in one sentence.

    Args:
        elsewhere: how to take another place instead ("choose another folder"), where there is a way.
    """
    code = number(error)
    if code in _STAYS:
        return f"{_STAYS[code]}."
    move = _OTHERWISE if code is None else _MOVES.get(code, _OTHERWISE)
    return f"{move}, or {elsewhere}." if elsewhere else f"{move}."


def reason(error: BaseException) -> str:
    """The system's own words."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:300]


def number(error: BaseException) -> int | None:
    """The system's error number, which libraries with errors of their own (safetensors, pyarrow) leave in the text."""
    own = getattr(error, "errno", None)
    if isinstance(own, int):
        return own
    found = re.search(r"\(os error (\d+)\)|\[errno (\d+)\]", str(error), re.IGNORECASE)
    return None if found is None else int(found[1] or found[2])


_OF_THE_FILE = (None, errno.ENOENT, errno.EINVAL)
"""Errors of a file that can be made again; the last is that of a file too short to map."""


def unreadable(path: Path, error: BaseException) -> Unreadable | None:
    """An error that says why the system does not give what a file holds; None where that itself is at fault."""
    if not isinstance(error, OSError) or number(error) in _OF_THE_FILE:
        return None
    return Unreadable(f"Cannot read {path} ({reason(error)}). {remedy(error)}")
