"""Installs a wheel in an environment, and what it asks for, without a download: `linked_environment.py ENV WHEEL`.

Run by the Python of another environment, which holds what the wheel asks for, and more: files are hard links to those
that are there, or copies where no link can be made. What the wheel does not ask for is left out.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import Distribution, distribution
from importlib.util import cache_from_source
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def requirements(wheel: Path) -> list[Requirement]:
    """Requirements of a wheel, without those of its extras."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        asked = Parser().parsestr(file.read(name).decode()).get_all("Requires-Dist", [])
    return applying(asked, {""})


def applying(asked: list[str], extras: set[str]) -> list[Requirement]:
    made = map(Requirement, asked)
    return [each for each in made if not each.marker or any(each.marker.evaluate({"extra": name}) for name in extras)]


def closure(asked: list[Requirement]) -> list[Distribution]:
    """All that is asked for, by what is asked for too.

    Raises:
        PackageNotFoundError: something of it is not in the environment of this Python.
    """
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    while asked:
        each = asked.pop()
        name = canonicalize_name(each.name)
        found.setdefault(name, distribution(name))
        new = {"", *each.extras} - {extra for of, extra in seen if of == name}
        seen |= {(name, extra) for extra in new}
        asked += applying(found[name].requires or [], new) if new else []
    return list(found.values())


def link(package: Distribution, folder: Path) -> None:
    """Put a package's files into another folder of packages, modules with what Python has compiled of them; its
    commands are left out.
    """
    listed = [file for file in map(Path, package.files or []) if ".." not in file.parts]
    compiled = [Path(cache_from_source(str(file))) for file in listed if file.suffix == ".py"]
    for file in {*listed, *compiled}:
        source, target = Path(str(package.locate_file(file))), folder / file
        if not source.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)


def main(environment: Path, wheel: Path) -> None:
    python = environment / "bin" / "python"
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    folder = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    packages = closure(requirements(wheel))
    for package in packages:
        link(package, folder)
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", wheel], check=True)
    subprocess.run([*pip, "check"], check=True)
    print(f"{wheel.name} with {len(packages)} packages that it asks for.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
