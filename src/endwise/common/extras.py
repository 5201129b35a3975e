"""Extras of the package: what to install where a package is missing that is not needed by all."""

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

from endwise.common.errors import ConfigError

MODULES: Mapping[str, str] = {"umap": "umap-learn"}
"""Packages by module, where the two have different names."""


def extra_of(package: str) -> str | None:
    """Name the extra that brings a package; None: none does. The fullest (`dev`) comes last."""
    try:
        lines = requires("endwise") or []
    except PackageNotFoundError:
        return None
    found = [
        extra[1]
        for line in lines
        if re.split(r"[^\w.-]", line, maxsplit=1)[0].lower().replace("_", "-") == package.lower().replace("_", "-")
        and (extra := re.search(r"extra == ['\"](\w+)['\"]", line))
    ]
    return next((extra for extra in found if extra != "dev"), None)


def install_for(error: Exception, told: str) -> str:
    """Say what to install, given an import that failed and what was said of it."""
    words = [getattr(error, "name", None) or "", *re.findall(r"[A-Za-z_][\w-]*", told)]
    for word in words:
        if extra := extra_of(MODULES.get(word, word)):
            return f"Install it: pip install 'endwise[{extra}]'"
    return "Install it first."


def check_extra(module: str) -> None:
    """To be asked before what takes long is begun that needs a package of an extra at its end.

    Raises:
        ConfigError: it is not installed.
    """
    package = MODULES.get(module, module)
    if find_spec(module) is None:
        raise ConfigError(
            f"{package} is not installed. Install it: pip install 'endwise[{extra_of(package) or package}]'"
        )
