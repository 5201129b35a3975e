"""Writes tests/fixtures/rivals: what other packages compute, for tests that compare with them without installing them.

One rival is run at a time, each in an environment of its own, with the CPU build of torch that `constraints.txt` names:

    python -m venv rival && export PIP_CONSTRAINT=constraints.txt
    rival/bin/pip install sae-lens==6.54.12             # brings transformer-lens 3
    rival/bin/pip install dictionary-learning==0.1.0
    rival/bin/pip install eai-sparsify==1.3.3
    rival/bin/python tools/rival_fixtures.py sae-lens   # or dictionary-learning, or eai-sparsify

Everything is drawn from a fixed seed and computed in float32 on one thread: run twice in one environment, it writes the
same bytes. tests/fixtures/rivals/README.md says what each file holds, with the formulas that the rivals compute.

In the environment of `sae-lens`, a folder that endwise has written can also be opened as SAELens opens it, and its
latents and outputs compared with those that endwise gives; the file holds `inputs`, `latents` and `outputs`:

    rival/bin/python tools/rival_fixtures.py open FOLDER EXPECTED.safetensors
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

RIVALS = {
    "sae-lens": "rival_packages.of_sae_lens",
    "dictionary-learning": "rival_packages.of_dictionary_learning",
    "eai-sparsify": "rival_packages.of_sparsify",
}
"""The module that drives each package."""


def main() -> int:
    """Runs one subcommand; 1 if `open` finds a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for rival in RIVALS:
        commands.add_parser(rival, help=f"write the fixtures of {rival}, which must be installed here")
    opening = commands.add_parser("open", help="open a folder in SAELens, and compare latents and outputs")
    opening.add_argument("folder", type=Path)
    opening.add_argument("expected", type=Path, help="safetensors with inputs, latents and outputs")
    opening.add_argument("--tolerance", type=float, default=1e-5, help="largest difference; 1e-5 if not given")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if given.command == "open":
        from rival_packages.opening import compare

        return compare(given.folder, given.expected, given.tolerance)
    importlib.import_module(RIVALS[given.command]).write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
