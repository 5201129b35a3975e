"""Examination of an installation: versions, processor, GPU, cache, disk, and what is known to go wrong."""

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from endwise.common.digests import cache_folder
from endwise.common.errors import RunFolderError
from endwise.common.extras import requirements, version_of
from endwise.common.files import check_can_write, expanded
from endwise.common.machine import available_memory, free_disk, size_text

LITTLE_DISK, LITTLE_MEMORY = 5 << 30, 2 << 30
"""Bytes under which a model of ordinary size does not fit."""
SHOWN = ("torch", "transformers", "datasets", "safetensors", "huggingface-hub", "tokenizers", "numpy")


@dataclass(frozen=True)
class Examination:
    """The finding, in a line."""

    facts: dict[str, str]
    problems: tuple[str, ...]
    """Each with its remedy."""

    @property
    def is_well(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return {"facts": self.facts, "problems": list(self.problems), "is_well": self.is_well}


def examine() -> Examination:
    """Examine the installation and the machine; the network is not asked."""
    import torch

    hub = expanded(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    memory = available_memory()
    processor = _of_processor("model name") or platform.processor() or platform.machine()
    own, threads = version_of("endwise") or "not installed", torch.get_num_threads()
    facts = {
        "endwise": f"{own}, Python {platform.python_version()}, {platform.platform()}",
        "packages": ", ".join(f"{name} {version_of(name) or 'not installed'}" for name in SHOWN),
        "extras": ", ".join(_extras()) or "none",
        "processor": f"{processor}, {os.cpu_count()} cores, {threads} thread{'s' * (threads != 1)}, "
        f"{torch.backends.cpu.get_cpu_capability()}{', AMX' if 'amx_bf16' in _of_processor('flags').split() else ''}",
        "memory": "unknown" if memory is None else f"{size_text(memory)} free",
        "GPU": ", ".join(_gpus()) or "none that PyTorch can use",
        "cache": f"{cache_folder()} ({size_text(free_disk(cache_folder()))} free; $ENDWISE_CACHE)",
        "hub cache": f"{hub} ({size_text(free_disk(hub))} free; $HF_HOME)",
        "here": f"{Path.cwd()} ({size_text(free_disk(Path.cwd()))} free)",
    }
    return Examination(facts, (*_conflicts(), *_of_devices(), *_of_places(cache_folder(), hub, Path.cwd())))


def _extras() -> list[str]:
    """List the extras all of whose packages are installed."""
    packages: dict[str, list[bool]] = {}
    for requirement, extra in requirements():
        if extra is not None:
            packages.setdefault(extra, []).append(version_of(requirement.name) is not None)
    return [extra for extra, there in packages.items() if all(there)]


def _conflicts() -> Iterator[str]:
    """Yield packages that are not those which this version was tried with."""
    for requirement, extra in requirements():
        if extra == "dev":  # whose tools are nobody else's
            continue
        found = version_of(requirement.name)
        if found is None:
            if extra is None:
                yield f"{requirement.name} is not installed. Install it: {_pip(requirement)}"
        elif not requirement.specifier.contains(found, prereleases=True):
            yield (
                f"{requirement.name} is {found}, and endwise asks for {requirement.specifier}. Change it: "
                f"{_pip(requirement)}"
            )


def _pip(requirement: Requirement) -> str:
    return f"pip install '{requirement.name}{requirement.specifier}'"


def _of_devices() -> Iterator[str]:
    import torch

    if Path("/proc/driver/nvidia/version").exists() and not torch.cuda.is_available():
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
        yield (
            f"There is an NVIDIA driver, but PyTorch, which {built}, cannot use it. Install a build that fits the "
            "driver (nvidia-smi names its CUDA version), or set model.device=cpu."
        )
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if threads > cores:
        yield f"{threads} threads compute on {cores} cores. Lower OMP_NUM_THREADS to {cores}."
    memory = available_memory()
    if memory is not None and memory < LITTLE_MEMORY:
        yield f"Only {size_text(memory)} of memory are free. End other programs, or take a small model."


def _of_places(cache: Path, hub: Path, here: Path) -> Iterator[str]:
    for what, folder, setting in (
        ("cache", cache, "ENDWISE_CACHE"),
        ("hub cache", hub, "HF_HOME"),
        ("here", here, "out"),
    ):
        try:
            check_can_write(folder)
        except RunFolderError as error:
            yield f"{what}: {error} Set {setting} to another folder."
            continue
        if (free := free_disk(folder)) < LITTLE_DISK:
            yield f"{what}: only {size_text(free)} are free at {folder}. Free space, or set {setting} to another disk."


def _of_processor(key: str) -> str:
    """Read what Linux says of the first core; empty where it says nothing."""
    try:
        found = re.search(rf"^{key}\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else ""


def _gpus() -> Iterator[str]:
    import torch

    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        of = torch.cuda.get_device_properties(number)
        capability = f"compute capability {of.major}.{of.minor}, CUDA {torch.version.cuda}"
        yield f"{of.name} ({size_text(of.total_memory)}, {capability})"
