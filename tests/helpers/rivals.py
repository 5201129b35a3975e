"""Results of rival packages, stored in fixtures/rivals by tools/rival_fixtures.py; the README there explains them."""

import json
from dataclasses import dataclass

from safetensors.torch import load_file

from places import FIXTURES

FOLDER = FIXTURES / "rivals"
PACKAGES = ("sae_lens", "dictionary_learning", "eai_sparsify")


@dataclass(frozen=True)
class Rival:
    """One file: its tensors by key, and its settings."""

    name: str
    tensors: dict
    settings: dict

    def under(self, prefix):
        """The tensors `prefix.*`, named without it."""
        start = f"{prefix}."
        return {key.removeprefix(start): tensor for key, tensor in self.tensors.items() if key.startswith(start)}

    @property
    def folder(self):
        """The SAE as the rival saved it, of a file under `inference`."""
        return FOLDER / self.name


def rival(name):
    """The fixture of a name such as `sae_lens/topk`."""
    package, _, case = name.partition("/")
    return Rival(name, load_file(FOLDER / f"{name}.safetensors"), about(package)["cases"][case])


def rivals(package, under=""):
    """The names of a package's fixtures: those in the folder `under`, which is none or one of the package's."""
    names = [case for case in about(package)["cases"] if case.rpartition("/")[0] == under]
    return [f"{package}/{case}" for case in sorted(names)]


def about(package):
    """A package's version, and the settings of all its files."""
    return json.loads((FOLDER / f"{package}.json").read_text())


def batches():
    """`[20 16 8]`: the batches of the 20 steps, the same for all rivals; the first is every file's `x`."""
    return load_file(FOLDER / "inputs.safetensors")["batches"]
