"""Room that this machine has: memory that a new process could take, and free disk."""

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from endwise.common.errors import ConfigError

UNITS = {"": 1, "B": 1, **{f"{p}iB": 1 << 10 * (i + 1) for i, p in enumerate("KMGT")}}
UNITS |= {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
NO_LIMIT = 1 << 60
"""cgroup v1 writes a number beyond any memory where there is no limit."""


def parse_size(text: str) -> int:
    """Bytes of `80GiB`, `24 GB`, `512MiB` or a plain number.

    Raises:
        ConfigError: it is none of these.
    """
    units = {unit.lower(): size for unit, size in UNITS.items()}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    size = None if match is None or match[2].lower() not in units else float(match[1]) * units[match[2].lower()]
    if not size:
        raise ConfigError(
            f"A size is a number above 0 with a unit ({', '.join(u for u in UNITS if u)}); given {text!r}."
        )
    return int(size)


def size_text(size: int) -> str:
    """Write it in the largest binary unit of which it has one."""
    if size < 1024:
        return f"{size} B"
    value, unit = size / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if value >= 1024:
            value, unit = value / 1024, larger
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that a new process could take: what the kernel counts as available, within the limits of the control groups
    that this process is in. None where the system does not say.

    Args:
        root: where `proc` and `sys` lie.
    """
    free = [*_control_groups(root)]
    with suppress(OSError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return min(free, default=None)


def _control_groups(root: Path) -> Iterator[int]:
    """Yield what each limit leaves: v2 in one tree, v1 in the memory controller's; it holds for groups below."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == top.parent:
                break
            left = _left(folder, limit, used)
            if left is not None:
                yield left


def _left(folder: Path, limit: str, used: str) -> int | None:
    """Pages of files that nobody has used for a while are dropped before memory runs out, and count as free."""
    try:
        most = int((folder / limit).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        taken = int((folder / used).read_text()) - int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return None
    return None if most >= NO_LIMIT else max(0, most - taken)


def resident_memory() -> int:
    """Bytes that this process holds now; where the system does not say, the most that it has held, or 0."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def free_disk(path: Path) -> int:
    """Bytes free where a folder is or would be made."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free
