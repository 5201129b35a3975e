"""Says which versions are the oldest that pyproject.toml allows, as pip takes them: `oldest_versions.py torch ...`."""

import re
import sys
import tomllib
from pathlib import Path


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(project["dependencies"]), re.MULTILINE))
    pinned = {name: f"{lowest[name]}.0" if "." not in lowest[name] else lowest[name] for name in sys.argv[1:]}
    print(*(f"{name}=={version}.*" for name, version in pinned.items()))


if __name__ == "__main__":
    main()
