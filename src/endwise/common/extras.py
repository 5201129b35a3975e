"""Extras of the package: what to install where a package is missing that is not needed by all."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from endwise.common.errors import ConfigError

MODULES: Mapping[str, str] = {"umap": "umap-learn"}
"""Packages by module, where the two have different names."""


def requirements() -> Iterator[tuple[Requirement, str | None]]:
    """Yield what the package asks for, each with its extra."""
    try:
        lines = requires("endwise") or []
    except PackageNotFoundError:
        lines = []
    for line in lines:
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        yield Requirement(line), extra[1] if extra else None


@cache
def version_of(package: str) -> str | None:
    """Return the version of a package that is installed; None: it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def extra_of(package: str) -> str | None:
    """Name the extra that brings a package; None: none does. The fullest (`dev`) is none of them."""
    same = (extra for asked, extra in requirements() if canonicalize_name(asked.name) == canonicalize_name(package))
    return next((extra for extra in same if extra not in (None, "dev")), None)


def install_for(error: Exception, message: str) -> str:
    """Say what to install, given an import that failed and its message."""
    words = [getattr(error, "name", None) or "", *re.findall(r"[A-Za-z_][\w-]*", message)]
    for word in words:
        if extra := extra_of(MODULES.get(word, word)):
            return f"Install it: pip install 'endwise[{extra}]'"
    return "Install it first."


def check_extra(module: str) -> None:
    """Check a package of an extra before long work that needs it at its end.

    Raises:
        ConfigError: it is not installed.
    """
    package = MODULES.get(module, module)
    if find_spec(module) is None:
        raise ConfigError(
            f"{package} is not installed. Install it: pip install 'endwise[{extra_of(package) or package}]'"
        )
